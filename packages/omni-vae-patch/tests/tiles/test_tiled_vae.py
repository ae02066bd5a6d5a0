"""What a divided autoencoder refuses, how it fails, and what it leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from toy_vaes import (
    Bypassing,
    Counting,
    Depending,
    Feeding,
    Looking,
    Passing,
    Remembering,
    Skipping,
    Toy,
)

from omni_group_coordinator import (
    GroupCoordinator,
    ParallelConfigError,
    ParallelError,
    RankMismatchError,
)
from omni_vae_patch.tiles import TiledVae
from omni_vae_patch.tiles.network_state import MemoryMarks


def world_group() -> GroupCoordinator:
    return GroupCoordinator.from_process_group(dist.group.WORLD, name="vae")


def latent(height: int = 8, width: int = 10, batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(0))


def test_a_network_that_remembers_is_called_in_order_by_one_rank_per_row(ranks: Any) -> None:
    @torch.no_grad()
    def compare() -> tuple[list[bool], int, bool]:
        vae = Remembering()
        tiled = TiledVae(vae, world_group())
        equal = []
        for height, width in ((8, 10), (12, 8), (8, 10)):
            z = latent(height, width)
            equal.append(torch.equal(vae.decode(z).sample, tiled.decode(z).sample))
        calls: list[int] = []
        vae.decoder.register_forward_hook(lambda *_: calls.append(1))
        tiled.decode(latent())
        return equal, len(calls), vae.decoder.layer.last is None

    # Two rows of three tiles: each rank makes one row.
    assert ranks.run(compare) == [([True] * 3, 3, True)] * 2


def test_a_network_whose_memory_is_never_cleared_is_left_to_one_rank(ranks: Any) -> None:
    @torch.no_grad()
    def compare() -> tuple[bool, int]:
        vae = Counting()
        tiled = TiledVae(vae, world_group())
        alone = vae.decode(latent()).sample
        tiled.decode(latent())
        vae.decoder.count = 0
        return torch.equal(tiled.decode(latent()).sample, alone), vae.decoder.count

    assert ranks.run(compare) == [(True, 6), (True, 0)]


def test_marks_leave_what_was_there() -> None:
    network = Remembering().decoder
    network.layer.last = kept = latent()
    marks = MemoryMarks(network, {("layer", "last")})
    assert [marks.kept(), marks.kept()] == [False, True]
    network.layer.last = None
    assert not marks.kept()
    marks.restore()
    assert network.layer.last is kept


def test_results_that_are_given_back_to_the_network_keep_their_calls_together(ranks: Any) -> None:
    @torch.no_grad()
    def compare() -> tuple[bool, int]:
        vae = Passing()
        tiled = TiledVae(vae, world_group())
        alone = vae.decode(latent()).sample
        calls: list[int] = []
        vae.decoder.register_forward_hook(lambda *_: calls.append(1))
        return torch.equal(tiled.decode(latent()).sample, alone), len(calls)

    assert ranks.run(compare) == [(True, 3)] * 2


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Feeding, "makes one tile from the result of another"),
        (Looking, "looks at their values before"),
        (Bypassing, "never calls its decoder"),
        (Depending, None),
        (Skipping, None),
    ],
)
def test_code_that_cannot_be_divided_is_refused_by_name(
    ranks: Any, kind: type[Toy], words: str | None
) -> None:
    @torch.no_grad()
    def refused() -> tuple[str, bool]:
        vae = kind()
        tiled = TiledVae(vae, world_group())
        alone = vae.decode(latent()).sample
        with pytest.raises(ParallelError) as caught:
            tiled.decode(latent())
        return str(caught.value), torch.equal(vae.decode(latent()).sample, alone)

    for text, usable in ranks.run(refused, timeout=30):
        assert kind.__name__ in text
        assert (words or "depends on what they return") in text
        assert usable


def test_no_network_and_gradients_and_another_result_are_refused() -> None:
    group = GroupCoordinator([[0]], 0, "gloo")
    with pytest.raises(ParallelConfigError, match="a Toy has no module 'encoder'"):
        TiledVae(Toy(), group).encode(latent())
    with pytest.raises(ParallelConfigError, match="asks for gradients"):
        TiledVae(Toy(), group).decode(latent().requires_grad_())
    with pytest.raises(ParallelConfigError, match="legal here: 'all', 'first'"):
        TiledVae(Toy(), group, "last")


def test_one_rank_calls_the_autoencoder() -> None:
    vae = Toy()
    tiled = TiledVae(vae, GroupCoordinator([[0]], 0, "gloo"))
    assert torch.equal(tiled.decode(latent()).sample, vae.decode(latent()).sample)


@pytest.mark.parametrize("result", ["all", "first"])
@pytest.mark.parametrize("when", ["first call", "later"])
@pytest.mark.parametrize("error", [KeyError, torch.OutOfMemoryError])
def test_a_rank_that_fails_is_an_error_on_all(
    ranks: Any, result: str, when: str, error: type[Exception]
) -> None:
    @torch.no_grad()
    def fail() -> tuple[bool, bool, str, bool]:
        vae = Toy()
        tiled = TiledVae(vae, world_group(), result)
        if when == "later":
            tiled.decode(latent())

        def raising(*_: Any) -> None:
            if dist.get_rank() == 1:
                msg = "planted"
                raise error(msg)

        hook = vae.decoder.register_forward_hook(raising)
        with pytest.raises(Exception, match="planted") as caught:
            tiled.decode(latent())
        hook.remove()
        again = tiled.decode(latent())
        alone = vae.decode(latent()).sample
        usable = torch.equal(again.sample, alone) if again is not None else result == "first"
        is_error = isinstance(caught.value, error)
        return is_error, isinstance(caught.value, ParallelError), str(caught.value), usable

    out_of_memory = error is torch.OutOfMemoryError
    found = ranks.run(fail, world_size=3, timeout=30)
    other = (out_of_memory, True)
    assert [one[:2] for one in found] == [other, (True, False), other]
    assert all("rank 1" in found[rank][2] for rank in (0, 2))
    assert all(usable for *_, usable in found)


def test_a_failure_while_tiles_are_joined_is_an_error_on_all(ranks: Any) -> None:
    class Joining(Toy):
        _fails = False

        def joined(self, z: Tensor) -> Tensor:
            whole = super().joined(z)
            if self._fails and type(whole) is Tensor:
                msg = "planted"
                raise ValueError(msg)
            return whole

    @torch.no_grad()
    def fail() -> tuple[str, bool]:
        vae = Joining()
        tiled = TiledVae(vae, world_group(), "first")
        vae._fails = dist.get_rank() == 0
        try:
            tiled.decode(latent())
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        vae._fails = False
        again = tiled.decode(latent())
        return found, again is None or torch.equal(again.sample, vae.decode(latent()).sample)

    first, second = ranks.run(fail, timeout=30)
    assert first == ("ValueError: planted", True)
    assert second[0].startswith("ParallelError: joining the tiles")
    assert "rank 0: ValueError: planted" in second[0]
    assert second[1]


def test_ranks_with_other_inputs_or_settings_are_told(ranks: Any) -> None:
    @torch.no_grad()
    def differ() -> list[str]:
        vae = Toy()
        tiled = TiledVae(vae, world_group())
        tiled.decode(latent(8, 8))
        tiled.decode(latent(8, 12))
        texts = []
        # Both sizes are known to both ranks; a third is not.
        for widths in ((8, 12), (8, 16)):
            with pytest.raises(RankMismatchError) as caught:
                tiled.decode(latent(8, widths[dist.get_rank()]))
            texts.append(str(caught.value))
        vae.tile_latent_min_size = 4 + dist.get_rank()
        with pytest.raises(RankMismatchError) as caught:
            tiled.decode(latent(8, 8))
        vae.tile_latent_min_size = 4
        same = tiled.decode(latent(8, 8)).sample
        assert torch.equal(same, vae.decode(latent(8, 8)).sample)
        return [*texts, str(caught.value)]

    for known, new, settings in ranks.run(differ, timeout=30):
        assert "4x4" in known
        assert "16" in new
        assert "'tile_latent_min_size': 5" in settings


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * 2


def test_a_compiled_network_is_called_as_it_is(ranks: Any) -> None:
    @torch.no_grad()
    def compare() -> tuple[bool, int]:
        vae = Toy()
        vae.decoder = Network()
        seen: list[int] = []

        def backend(module: Any, _inputs: Any) -> Any:
            def run(*args: Any) -> Any:
                seen.append(1)
                return module(*args)

            return run

        vae.decoder.compile(backend=backend)
        tiled = TiledVae(vae, world_group())
        z = latent(8, 8)
        alone = vae.decode(z).sample
        seen.clear()
        return torch.equal(tiled.decode(z).sample, alone), len(seen)

    assert ranks.run(compare) == [(True, 2)] * 2


def test_inference_mode(ranks: Any) -> None:
    @torch.inference_mode()
    def compare() -> bool:
        vae = Toy()
        tiled = TiledVae(vae, world_group())
        return torch.equal(tiled.decode(latent()).sample, vae.decode(latent()).sample)

    assert ranks.run(compare) == [True] * 2
