"""The decode method of a pipeline's VAE, replaced and put back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from stock_autoencoders import CASES
from tile_sizes import small_tiles
from torch import Tensor
from toy_vaes import Toy

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_vae_patch.tiles import enabled_tiling
from omni_vae_patch.vae_patch_parallel import (
    VaePatchParallelism,
    _factor_pp_grid,
    maybe_wrap_vae_decode_with_patch_parallelism,
)


def wrap(vae: Any, size: int, group: Any = None) -> VaePatchParallelism:
    wrapper = maybe_wrap_vae_decode_with_patch_parallelism(
        SimpleNamespace(vae=vae),
        vae_patch_parallel_size=size,
        group_getter=lambda: dist.group.WORLD if group is None else group,
    )
    assert wrapper is not None
    return wrapper


def latent(height: int = 8, width: int = 10) -> Tensor:
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(0))


def test_the_grid_is_the_most_square_one() -> None:
    grids = [_factor_pp_grid(size) for size in (1, 2, 3, 4, 6, 7, 8, 12)]
    assert grids == [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (1, 7), (2, 4), (3, 4)]


def test_one_patch_or_no_vae_changes_nothing() -> None:
    vae = Toy()
    for pipeline, size in ((SimpleNamespace(vae=vae), 1), (SimpleNamespace(), 2)):
        assert (
            maybe_wrap_vae_decode_with_patch_parallelism(
                pipeline, vae_patch_parallel_size=size, group_getter=lambda: None
            )
            is None
        )
    assert "decode" not in vars(vae)


@torch.no_grad()
def decoded_on_a_subgroup(tiling: bool) -> tuple[Any, ...]:
    """On ranks 1 and 2 of three: group ranks are not global ranks."""
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return ()
    case = CASES["kl"]
    vae = case.build()
    z = case.latent(8, 11, 0)  # at 11 the second patch begins within a tile
    whole = vae.decode(z).sample
    if tiling:
        with enabled_tiling(vae, **small_tiles(vae, case)):
            alone = vae.decode(z)
            wrapper = wrap(vae, 2, group)
            found = vae.decode(z)
            pair = vae.decode(z, return_dict=False)
            wrapper.remove()
    else:
        alone = vae.decode(z)
        wrapper = wrap(vae, 2, group)
        found = vae.decode(z)
        pair = vae.decode(z, return_dict=False)
        wrapper.remove()
    assert type(found) is type(alone)
    assert type(pair) is tuple
    assert torch.equal(pair[0], found.sample)
    undone = "decode" not in vars(vae) and torch.equal(vae.decode(z).sample, whole)
    error = float((found.sample - alone.sample).abs().mean() / alone.sample.std())
    return error, tuple(found.sample.shape) == tuple(alone.sample.shape), undone, found.sample


def test_tiles_equal_the_vaes_own(ranks: Any) -> None:
    _, *found = ranks.run(decoded_on_a_subgroup, tiling=True, world_size=3)
    assert [one[:3] for one in found] == [(0.0, True, True)] * 2


def test_patches_are_near_the_whole_and_alike_on_all_ranks(ranks: Any) -> None:
    _, *found = ranks.run(decoded_on_a_subgroup, tiling=False, world_size=3)
    for error, same_shape, undone, _ in found:
        assert 0 < error < 0.5
        assert same_shape
        assert undone
    assert torch.equal(found[0][3], found[1][3])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_patches_of_a_pointwise_vae_are_exact(ranks: Any, size: int) -> None:
    """So every position is decoded once, and lands in its place."""

    @torch.no_grad()
    def compare() -> list[bool]:
        vae = Toy(norm=False)
        vae.use_tiling = False
        shapes = ((8, 10), (7, 9), (1, 1), (3, 2))
        alone = [vae.decode(latent(*shape)).sample for shape in shapes]
        wrap(vae, size)
        pairs = zip(shapes, alone, strict=True)
        return [torch.allclose(vae.decode(latent(*shape)).sample, one) for shape, one in pairs]

    assert ranks.run(compare, world_size=4) == [[True] * 4] * 4


def test_latents_of_videos_go_to_the_vae() -> None:
    vae = SimpleNamespace(decode=lambda z, return_dict: ("decoded", z.ndim, return_dict))
    wrapper = VaePatchParallelism(vae, vae_patch_parallel_size=2, group_getter=lambda: None)
    assert wrapper.decode(torch.zeros(1, 4, 2, 8, 8)) == ("decoded", 5, True)


def test_a_method_of_the_instance_is_put_back() -> None:
    def decode(z: Tensor) -> Tensor:
        return z

    vae = Toy()
    vae.decode = decode
    wrapper = wrap(vae, 2)
    wrapper.remove()
    wrapper.remove()
    assert vae.decode is decode


def test_an_error_of_one_rank_is_one_of_all(ranks: Any) -> None:
    @torch.no_grad()
    def fail() -> tuple[str, bool]:
        vae = Toy(norm=False)
        vae.use_tiling = False
        alone = vae.decode(latent()).sample
        wrap(vae, 2)

        def raising(*_: Any) -> None:
            if dist.get_rank() == 1:
                msg = "planted"
                raise KeyError(msg)

        hook = vae.decoder.register_forward_hook(raising)
        with pytest.raises((KeyError, ParallelError)) as caught:
            vae.decode(latent())
        hook.remove()
        return type(caught.value).__name__, torch.allclose(vae.decode(latent()).sample, alone)

    assert ranks.run(fail, timeout=30) == [("ParallelError", True), ("KeyError", True)]


def test_sizes_that_do_not_fit_are_refused(ranks: Any) -> None:
    with pytest.raises(ParallelConfigError, match="legal here: 1 to the number of ranks"):
        VaePatchParallelism(Toy(), vae_patch_parallel_size=0, group_getter=lambda: None)

    def refused() -> str:
        vae = Toy()
        wrap(vae, 3)
        with pytest.raises(ParallelConfigError, match="legal here: 1 to 2") as caught:
            vae.decode(latent())
        return str(caught.value)

    assert len(ranks.run(refused)) == 2
