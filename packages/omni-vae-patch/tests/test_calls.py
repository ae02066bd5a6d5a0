"""Calls of autoencoders on shards: sizes, settings, types, who takes part, who gets the result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_vaes import SmallVae, error, everyone, random, text_of
from stock_autoencoders import CASES, decoded, encoded

from omni_group_coordinator import GroupCoordinator
from omni_vae_patch import VaeParallelConfig, parallelize_vae

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:In CPU autocast:UserWarning"
)

EXACT = VaeParallelConfig("exact")
UNVERIFIED = VaeParallelConfig("exact", verify=False)


@torch.no_grad()
def of_sizes(name: str, sizes: list[tuple[int, int]]) -> list[float]:
    """Errors of decoding and encoding one size after the other."""
    case, group = CASES[name], everyone()
    vae = case.build()
    inputs = [(case.latent(h, w, 0), case.sample(h, w, 0)) for h, w in sizes]
    alone = [(decoded(vae, z), encoded(vae, x)) for z, x in inputs]
    found = []
    with parallelize_vae(vae, UNVERIFIED, group=group):
        for (z, x), (image, latent) in zip(inputs, alone, strict=True):
            found += [error(decoded(vae, z), image), error(encoded(vae, x), latent)]
    return found


@pytest.mark.parametrize("name", ["kl", "ltx2-video", "wan-2.1", "tiny"])
def test_ranks_for_which_there_are_no_rows_have_the_result_too(ranks, name):
    """In turn with sizes for which there are; LTX-2 mirrors rows at the border, of which a rank
    then needs two."""
    for found in ranks.run(of_sizes, name, [(2, 2), (5, 4), (3, 2)], world_size=4):
        assert max(found) <= 1e-5


@torch.no_grad()
def kl(**settings: Any) -> Any:
    vae = CASES["kl"].build()
    for name, value in settings.items():
        setattr(vae, name, value)
    return vae


@torch.no_grad()
def for_the_first() -> list[Any]:
    vae, z = kl(), random(1, 4, 7, 5)
    image, latent = vae.decode(z).sample, vae.encode(random(1, 3, 28, 20)).latent_dist.mean
    with parallelize_vae(vae, VaeParallelConfig("exact", result="first"), group=everyone()):
        found = vae.decode(z), vae.encode(random(1, 3, 28, 20))
    if found[0] is None:
        return list(found)
    return [error(found[0].sample, image), error(found[1].latent_dist.mean, latent)]


def test_a_result_for_the_first_is_none_elsewhere(ranks):
    first, *others = ranks.run(for_the_first, world_size=3)
    assert max(first) <= 1e-5
    assert others == [[None, None]] * 2


SLICING = ["kl", "flux2", "dc", "wan-2.1", "qwen-image", "cogvideox", "hunyuan-video", "ltx-video"]


@torch.no_grad()
def batched(name: str, slicing: bool) -> list[float]:
    """Of a batch of three, the samples of which differ."""
    case = CASES[name]
    vae = case.build()
    z = torch.cat([case.latent(5, 4, seed) for seed in range(3)])
    x = torch.cat([case.sample(5, 4, seed) for seed in range(3)])
    image, latent = decoded(vae, z), encoded(vae, x)
    if slicing:
        vae.enable_slicing()
    with parallelize_vae(vae, UNVERIFIED, group=everyone()):
        return [error(decoded(vae, z), image), error(encoded(vae, x), latent)]


@pytest.mark.parametrize("slicing", [True, False], ids=["one by one", "at once"])
@pytest.mark.parametrize("name", SLICING)
def test_a_batch_is_decoded_and_encoded_at_once_or_one_by_one(ranks, name, slicing):
    found = ranks.run(batched, name, slicing, world_size=3, timeout=90)
    assert max(value for errors in found for value in errors) <= 1e-5


@torch.no_grad()
def along(name: str, dim: str) -> list[float]:
    case = CASES[name]
    vae, z, x = case.build(), case.latent(9, 9, 0), case.sample(9, 9, 0)
    image, latent = decoded(vae, z), encoded(vae, x)
    with parallelize_vae(vae, VaeParallelConfig("exact", dim, verify=False), group=everyone()):
        return [error(decoded(vae, z), image), error(encoded(vae, x), latent)]


@pytest.mark.parametrize(("world_size", "dim"), [(3, "width"), (4, "height")])
@pytest.mark.parametrize("name", ["kl", "dc", "wan-2.1", "ltx2-video", "hunyuan-video"])
def test_either_side_may_lie_on_any_number_of_ranks(ranks, name, world_size, dim):
    found = ranks.run(along, name, dim, world_size=world_size, timeout=90)
    assert max(value for errors in found for value in errors) <= 1e-5


def with_gradients(dtype: torch.dtype) -> list[Any]:
    vae, group = SmallVae().to(dtype), everyone()
    z = random(1, 4, 7, 5, dtype=dtype)
    alone = vae.decode(z)
    with parallelize_vae(vae, UNVERIFIED, group=group):
        one = z.clone().requires_grad_(group.rank_in_group == 1)
        found: list[Any] = [text_of(lambda: vae.decode(one))]
        with torch.no_grad():
            found.append(error(vae.decode(one), alone))
        vae.requires_grad_(True)
        whole = vae.decode(z)
        found += [error(whole.detach(), alone), whole.requires_grad]
    return found


def test_gradients_are_refused_not_dropped(ranks):
    """By an input that asks for them; of weights that do, the result says that it has none."""
    results = ranks.run(with_gradients, torch.float32)
    for text, off, again, asks in results:
        assert "the input asks for gradients" in text
        assert max(off, again) <= 1e-5
        assert asks is False


@torch.no_grad()
def tiling_on() -> list[Any]:
    vae, z = kl(), random(1, 4, 12, 10)
    whole = vae.decode(z).sample
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 4, 16
    tiled = vae.decode(z).sample
    with parallelize_vae(vae, EXACT, group=everyone()):
        found = vae.decode(z).sample
        inside = vae.use_tiling
    return [error(tiled, whole), error(found, whole), inside, vae.use_tiling]


def test_tiling_is_ignored_and_left_on(ranks):
    for tiled, found, inside, after in ranks.run(tiling_on):
        assert tiled > 1e-3, "with tiles this autoencoder decodes otherwise"
        assert found <= 1e-5
        assert inside is True
        assert after is True


@torch.no_grad()
def in_half(name: str, dtype: torch.dtype) -> tuple[float, float]:
    """The error of the ranks, and of one rank, against float32."""
    case, vae = CASES[name], CASES[name].build()
    z = case.latent(6, 5, 0).to(dtype)
    truth = decoded(vae, z.float())
    vae = vae.to(dtype)
    alone = decoded(vae, z)
    with parallelize_vae(vae, EXACT, group=everyone()):
        found = decoded(vae, z)
    assert found.dtype is dtype
    return error(found.float(), truth), error(alone.float(), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["kl", "dc", "wan-2.1", "ltx-video", "cogvideox"])
def test_half_precision_passes_the_check_and_is_as_good_as_on_one_rank(ranks, name, dtype):
    for found, alone in ranks.run(in_half, name, dtype, timeout=90):
        assert found <= 1.5 * alone + 1e-3


def decoded_by_name() -> float:
    vae: Any = CASES["tiny"].build()
    z = random(1, 4, 7, 5)
    expected = vae.decode(x=z).sample
    with parallelize_vae(vae, EXACT, group=everyone()):
        return error(vae.decode(x=z).sample, expected)


def test_arguments_may_be_given_by_the_names_of_the_original(ranks):
    assert max(ranks.run(decoded_by_name)) <= 1e-5


@torch.no_grad()
def some_of_the_world(members: list[list[int]]) -> float:
    """Each group decodes a picture of its own."""
    rank = torch.distributed.get_rank()
    mine = next(index for index, group in enumerate(members) if rank in group)
    group = GroupCoordinator(members, rank, "gloo", name="some")
    vae, z = SmallVae(), random(1, 4, 7, 5, seed=mine)
    alone = vae.decode(z)
    with parallelize_vae(vae, EXACT, group=group):
        return error(vae.decode(z), alone)


def test_any_ranks_of_the_world_may_decode_together(ranks):
    assert max(ranks.run(some_of_the_world, [[3, 1], [0, 2]], world_size=4)) <= 1e-5
