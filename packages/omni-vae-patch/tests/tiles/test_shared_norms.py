"""Norms that share their statistics over the tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from toy_vaes import Toy

from omni_group_coordinator import GroupCoordinator, ParallelConfigError, ParallelError
from omni_vae_patch.tiles import TiledVae
from omni_vae_patch.tiles.shared_norms import merged


def world_group() -> GroupCoordinator:
    return GroupCoordinator.from_process_group(dist.group.WORLD, name="vae")


def ramp(width: int) -> Tensor:
    """Each tile has a mean of its own, far from the others."""
    noise = torch.randn(2, 4, 4, width, generator=torch.Generator().manual_seed(0))
    return noise + torch.linspace(-20, 20, width)


def test_merged_statistics_are_those_of_all_elements() -> None:
    parts = [ramp(8)[..., :1], ramp(8)[..., 1:6], ramp(8)[..., 6:]]
    statistics = []
    for part in parts:
        values = part.flatten(2)
        variance, mean = torch.var_mean(values, 2, correction=0)
        count = torch.full_like(mean, values.shape[2])
        statistics.append(torch.stack([count, mean, variance * count]))
    variance, mean = torch.var_mean(ramp(8).flatten(2), 2, correction=0)
    torch.testing.assert_close(merged(statistics), (mean, variance))


@pytest.mark.parametrize("width", [4, 8, 11])
def test_tiles_without_overlap_equal_the_whole(ranks: Any, width: int) -> None:
    @torch.no_grad()
    def compare() -> tuple[float, float]:
        vae = Toy()
        z = ramp(width)
        tiled = TiledVae(vae, world_group(), shared_norms=True)
        found = [tiled.decode(z).sample for _ in range(2)]
        apart = vae.decode(z).sample
        vae.use_tiling = False
        whole = vae.decode(z).sample
        assert not any("forward" in vars(module) for module in vae.modules())
        shared = max(float((one - whole).abs().max()) for one in found)
        return shared, float((apart - whole).abs().max())

    for shared, apart in ranks.run(compare, world_size=3):
        assert shared < 1e-5
        assert width == 4 or apart > 0.1


def test_half_precision_keeps_its_dtype(ranks: Any) -> None:
    @torch.no_grad()
    def compare() -> tuple[torch.dtype, float]:
        vae = Toy().to(torch.bfloat16)
        z = ramp(8).bfloat16()
        found = TiledVae(vae, world_group(), shared_norms=True).decode(z).sample
        vae.use_tiling = False
        return found.dtype, float((found - vae.decode(z).sample).abs().max())

    for dtype, error in ranks.run(compare):
        assert dtype == torch.bfloat16
        assert error < 0.1


def test_more_tiles_than_ranks_are_refused(ranks: Any) -> None:
    @torch.no_grad()
    def refused() -> str:
        with pytest.raises(ParallelConfigError) as caught:
            TiledVae(Toy(), world_group(), shared_norms=True).decode(ramp(12))
        return str(caught.value)

    for text in ranks.run(refused):
        assert "Toy has 3 tiles on 2 ranks" in text


def test_a_compiled_network_is_refused(ranks: Any) -> None:
    @torch.no_grad()
    def refused() -> str:
        vae = Toy()
        vae.decoder.compile(backend="eager")
        with pytest.raises(ParallelConfigError, match="not compiled") as caught:
            TiledVae(vae, world_group(), shared_norms=True).decode(ramp(8))
        return str(caught.value)

    assert len(ranks.run(refused)) == 2


class Doubling(nn.GroupNorm):
    """What it does beside would be left out."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_norm_with_a_forward_of_its_own_is_refused(ranks: Any) -> None:
    @torch.no_grad()
    def refused() -> list[str]:
        derived, hooked = Toy(), Toy()
        derived.decoder[1] = Doubling(2, 8)
        hooked.decoder[1].forward = lambda x: x * 2
        found = []
        for vae in (derived, hooked):
            with pytest.raises(ParallelConfigError) as caught:
                TiledVae(vae, world_group(), shared_norms=True).decode(ramp(8))
            found.append(str(caught.value))
        return found

    for derived, hooked in ranks.run(refused):
        assert "'1', a Doubling in Toy, has a forward of its own" in derived
        assert "'1', a GroupNorm in Toy, has a forward of its own" in hooked


@pytest.mark.parametrize("layer", [0, 3])
def test_a_rank_that_fails_before_or_after_a_norm_leaves_no_rank_waiting(
    ranks: Any, layer: int
) -> None:
    @torch.no_grad()
    def fail() -> tuple[str, bool]:
        vae = Toy()
        tiled = TiledVae(vae, world_group(), shared_norms=True)
        good = tiled.decode(ramp(12)).sample

        def raising(*_: Any) -> None:
            if dist.get_rank() == 1:
                msg = "planted"
                raise KeyError(msg)

        hook = vae.decoder[layer].register_forward_hook(raising)
        try:
            tiled.decode(ramp(12))
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        hook.remove()
        return found, torch.equal(tiled.decode(ramp(12)).sample, good)

    found = ranks.run(fail, world_size=3, timeout=30)
    assert found[1][0] == "KeyError: 'planted'"
    for rank in (0, 2):
        assert found[rank][0].startswith("ParallelError: tiled decode failed on rank 1: KeyError")
    assert all(usable for _, usable in found)


def test_tiles_that_are_not_in_step_are_told(ranks: Any) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.norm(x) if x.shape[-1] == 4 else x

    @torch.no_grad()
    def refused() -> str:
        vae = Toy()
        vae.decoder = Branching()
        tiled = TiledVae(vae, world_group(), shared_norms=True)
        with pytest.raises(ParallelError, match="the same norms") as caught:
            tiled.decode(ramp(6))
        assert torch.isfinite(tiled.decode(ramp(8)).sample).all()
        return str(caught.value)

    assert len(ranks.run(refused, timeout=30)) == 2
