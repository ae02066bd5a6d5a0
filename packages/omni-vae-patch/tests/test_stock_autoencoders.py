"""Unmodified autoencoders of diffusers on shards give what one rank gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stock_autoencoders import CASES, decoded, encoded
from torch import Tensor

from omni_parallel_state import ParallelLayout, ParallelState
from omni_vae_patch import VaeParallelConfig, parallelize_vae

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:In CPU autocast:UserWarning"
)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def errors(name: str, dims: list[Any], sizes: list[tuple[int, int]], verify: bool) -> list[float]:
    """Of decode and encode of some sizes in turn; modules are as before at the end."""
    case = CASES[name]
    vae = case.build()
    inputs = [(case.latent(h, w, h), case.sample(h, w, w)) for h, w in sizes]
    alone = [(decoded(vae, z), encoded(vae, x)) for z, x in inputs]
    before = {name: (type(m), set(vars(m))) for name, m in vae.named_modules()}
    ranks = torch.distributed.get_world_size()
    state = ParallelState(ParallelLayout(dp=ranks, vae=ranks))
    found = []
    for dim in dims:
        config = VaeParallelConfig("exact", dim, verify=verify)
        with parallelize_vae(vae, config, state=state):
            for (z, x), (image, latent) in zip(inputs, alone, strict=True):
                found += [error(decoded(vae, z), image), error(encoded(vae, x), latent)]
    assert {name: (type(m), set(vars(m))) for name, m in vae.named_modules()} == before
    assert torch.equal(decoded(vae, inputs[0][0]), alone[0][0])
    return found


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_decode_and_encode_as_one(ranks, name):
    # Seven rows are four and three; one size after the other in one process.
    sides, sizes = ["height", "width"], [(7, 5), (4, 6)]
    for found in ranks.run(errors, name, sides, sizes, False, world_size=2):
        assert max(found) <= 1e-5


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("world_size", "side"), [(3, "height"), (4, "width")])
def test_more_ranks_decode_and_encode_as_one(ranks, name, world_size, side):
    for found in ranks.run(errors, name, [side], [(8, 9)], False, world_size=world_size):
        assert max(found) <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_the_check_on_a_tiny_latent_passes(ranks, name):
    for found in ranks.run(errors, name, ["auto"], [(5, 5)], True, world_size=2):
        assert max(found) <= 1e-5
