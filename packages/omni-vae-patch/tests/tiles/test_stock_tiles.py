"""Tiles on several ranks equal those of one, bit for bit, for unmodified autoencoders."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from functools import wraps
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from stock_autoencoders import CASES, AutoencoderCase, decoded, encoded
from stock_autoencoders.autoencoder_case import image_case
from tile_sizes import small_tiles
from torch import Tensor

from omni_group_coordinator import GroupCoordinator, ParallelConfigError, record_traffic
from omni_vae_patch import VaeParallelConfig, parallelize_vae
from omni_vae_patch.tiles import TiledVae, enabled_tiling, tiling_options

diffusers = pytest.importorskip("diffusers")


def tiny() -> Any:
    """AutoencoderTiny takes its scale for 8, which is that of four levels."""
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )


TILED = {name: case for name, case in CASES.items() if name != "tiny"}
TILED["tiny-eight-fold"] = image_case("tiny-eight-fold", tiny, 4, 8)

NOISY = {"ltx-video-0.9.1", "ltx2-video-noisy"}
NOT_ENCODED = {
    "hunyuan-image": "its tiled_encode takes images for videos",
    "hunyuan-image-refiner": "its tiled_encode takes strides in latent positions for pixels",
}
NO_TILES = {"cosmos", "temporal-decoder"}
DECODED = sorted(TILED.keys() - NOISY)
ENCODED = sorted(TILED.keys() - NOT_ENCODED.keys())


def world_group() -> GroupCoordinator:
    return GroupCoordinator.from_process_group(dist.group.WORLD, name="vae")


def with_methods_of(tiled: TiledVae) -> Any:
    @wraps(tiled.vae.decode)
    def decode(*args: Any, **kwargs: Any) -> Any:
        return tiled.decode(*args, **kwargs)

    return SimpleNamespace(config=tiled.vae.config, decode=decode, encode=tiled.encode)


def call_of(case: AutoencoderCase, kind: str, batch: int = 1) -> tuple[Any, Tensor]:
    size = (5, 8) if case.is_video else (8, 8)
    make = case.latent if kind == "decode" else case.sample
    values = torch.cat([make(*size, seed) for seed in range(batch)])
    return (decoded if kind == "decode" else encoded), values


@torch.no_grad()
def both(case: AutoencoderCase, kind: str, result: str = "all", batch: int = 1) -> dict[str, Any]:
    """The tiled result of one rank and twice that of all, and who called the network how often."""
    vae = case.build()
    call, values = call_of(case, kind, batch)
    inner = vae.decoder if kind == "decode" else vae.encoder
    tiling = enabled_tiling(vae, **small_tiles(vae, case)) if tiling_options(vae) else nullcontext()
    with tiling:
        tiled = TiledVae(vae, world_group(), result)
        forwards: list[int] = []
        inner.register_forward_hook(lambda *_: forwards.append(1))
        alone = call(vae, values)
        all_calls = len(forwards)
        results, counts = [], []
        for _ in range(2):
            forwards.clear()
            found = None
            if result == "all" or dist.get_rank() == 0:
                found = call(with_methods_of(tiled), values)
            elif kind == "decode":
                assert tiled.decode(values) is None
            else:
                assert tiled.encode(values) is None
            results.append(found)
            counts.append(len(forwards))
        again = call(vae, values)
    kept = not {"decoder", "encoder", "decode", "encode"} & vars(vae).keys()
    wanted = result == "all" or dist.get_rank() == 0
    return {
        "equal": not wanted or all(torch.equal(alone, found) for found in results),
        "undone": kept and torch.equal(alone, again),
        "all_calls": all_calls,
        "calls": counts[-1],
        "finite": bool(torch.isfinite(alone).all()),
    }


def check_divided(found: list[dict[str, Any]], largest: float = 0.75) -> None:
    for one in found:
        assert one["equal"]
        assert one["undone"]
        assert one["finite"]
    assert sum(one["calls"] for one in found) == found[0]["all_calls"]
    if found[0]["all_calls"] > 1:
        assert max(one["calls"] for one in found) <= math.ceil(largest * found[0]["all_calls"])


@pytest.mark.parametrize("name", sorted(set(DECODED) - NO_TILES))
def test_tiled_decode_on_two_ranks(ranks: Any, name: str) -> None:
    check_divided(ranks.run(both, TILED[name], "decode"))


@pytest.mark.parametrize("name", sorted(set(ENCODED) - NO_TILES))
def test_tiled_encode_on_two_ranks(ranks: Any, name: str) -> None:
    check_divided(ranks.run(both, TILED[name], "encode"))


@pytest.mark.parametrize("kind", ["decode", "encode"])
@pytest.mark.parametrize("name", ["kl", "dc", "wan-2.1", "cogvideox", "magvit", "mochi"])
def test_three_ranks_and_a_batch_and_one_that_gets_it(ranks: Any, name: str, kind: str) -> None:
    case = TILED[name]
    check_divided(ranks.run(both, case, kind, "first", batch=2, world_size=3), largest=0.5)


@pytest.mark.parametrize("name", sorted(NOISY))
def test_noise_within_the_network_is_refused(ranks: Any, name: str) -> None:
    def refused() -> str:
        case = TILED[name]
        vae = case.build()
        call, values = call_of(case, "decode")
        with enabled_tiling(vae, **small_tiles(vae, case)):
            tiled = TiledVae(vae, world_group())
            with pytest.raises(ParallelConfigError) as caught:
                call(with_methods_of(tiled), values)
        return f"{type(vae).__name__}: {caught.value}"

    for message in ranks.run(refused):
        assert "draws random numbers" in message
        assert message.count(message.split(":")[0]) == 2


@pytest.mark.parametrize("name", ["kl", "cogvideox"])
def test_half_precision_slices_and_uneven_tiles(ranks: Any, name: str) -> None:
    @torch.no_grad()
    def compare() -> list[bool]:
        case = TILED[name]
        vae = case.build().to(torch.bfloat16)
        vae.enable_slicing()
        equal = []
        with enabled_tiling(vae, **small_tiles(vae, case)):
            tiled = TiledVae(vae, world_group())
            for height, width in ((7, 8), (4, 10), (4, 4), (7, 8)):
                z = torch.cat([case.latent(height, width, seed) for seed in range(2)]).bfloat16()
                tuples = vae.decode(z, return_dict=False), tiled.decode(z, return_dict=False)
                assert type(tuples[0]) is type(tuples[1]) is tuple
                equal.append(torch.equal(tuples[0][0], tuples[1][0]))
        return equal

    assert ranks.run(compare, world_size=3) == [[True] * 4] * 3


def test_posteriors_are_the_autoencoders_own(ranks: Any) -> None:
    @torch.no_grad()
    def compare() -> tuple[bool, bool]:
        case = TILED["kl"]
        vae = case.build()
        with enabled_tiling(vae, **small_tiles(vae, case)):
            x = case.sample(8, 8, 0)
            one, other = vae.encode(x), TiledVae(vae, world_group()).encode(x)
        same = type(one) is type(other) and type(one.latent_dist) is type(other.latent_dist)
        draws = [o.latent_dist.sample(torch.Generator().manual_seed(3)) for o in (one, other)]
        return same, torch.equal(*draws)

    assert ranks.run(compare) == [(True, True)] * 2


def test_steady_state_moves_the_tiles_and_three_numbers(ranks: Any) -> None:
    """A tile of another rank travels once to each rank that joins them, in its exact size."""

    @torch.no_grad()
    def traffic() -> tuple[dict[str, int], dict[str, int], int]:
        case = TILED["kl"]
        vae = case.build()
        z = case.latent(7, 8, 0)
        sizes: list[int] = []
        vae.decoder.register_forward_hook(lambda _m, _a, out: sizes.append(out.nbytes))
        with enabled_tiling(vae, **small_tiles(vae, case)):
            tiled = TiledVae(vae, world_group(), "first")
            tiled.decode(z)
            sizes.clear()
            with record_traffic() as counted:
                tiled.decode(z)
        return dict(counted.bytes_sent), dict(counted.calls), sum(sizes)

    first, second = ranks.run(traffic)
    # Three integers before the tiles, and three when they are joined.
    agreed = {"all_reduce": 2 * 3 * 8}
    assert first[0] == agreed | {"tiles": 0}
    assert second[0] == agreed | {"tiles": second[2]}
    assert second[2] > 0
    assert first[1] == second[1] == {"all_reduce": 2, "tiles": 1}


@pytest.mark.parametrize("name", sorted(NO_TILES))
def test_without_tiles_one_rank_computes_for_all(ranks: Any, name: str) -> None:
    found = ranks.run(both, TILED[name], "decode")
    assert all(one["equal"] and one["undone"] for one in found)
    assert sorted(one["calls"] for one in found) == [0, found[0]["all_calls"]]


@torch.no_grad()
def allegro() -> tuple[list[str], bool, str]:
    """It has code for tiles alone: what is said, whether they are its own, and of exact mode."""
    vae = diffusers.AutoencoderKLAllegro(
        latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4
    ).eval()
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    vae.enable_tiling()
    vae.kernel, vae.stride = (8, 32, 32), (4, 24, 24)
    z = torch.randn(1, 4, 2, 7, 8, generator=torch.Generator().manual_seed(0))
    alone, group = vae.decode(z).sample, world_group()
    log = Lines()
    logging.getLogger("omni_vae_patch").addHandler(log)
    with parallelize_vae(vae, group=group):
        same = torch.equal(vae.decode(z).sample, alone)
    logging.getLogger("omni_vae_patch").removeHandler(log)
    try:
        parallelize_vae(vae, VaeParallelConfig("exact"), group=group)
    except ParallelConfigError as error:
        return log.lines, same, str(error)
    return log.lines, same, "none"


def test_one_that_has_tiles_alone_takes_them_with_a_warning(ranks: Any) -> None:
    for lines, same, text in ranks.run(allegro, timeout=90):
        (line,) = lines
        assert "decoding by tiles, which approximate the whole" in line
        assert same
        assert "AutoencoderKLAllegro cannot be sharded: NotImplementedError" in text


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
