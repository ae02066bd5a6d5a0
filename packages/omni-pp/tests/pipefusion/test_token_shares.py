"""Patches that the ranks of a stage share are what one rank makes of them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from deepened_pipelines import LISTED, build
from hypothesis import given
from hypothesis import strategies as st
from pipefusion_cases import STEPS, alone, arguments, distance, fused, strays
from stock_pipelines import picture
from torch import Tensor

from omni_group_coordinator import ParallelError, record_traffic
from omni_pp.pipefusion.token_shares import share_bounds
from rank_harness import RankPool

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:In CPU autocast:UserWarning"
)


@given(st.integers(0, 99), st.integers(1, 999), st.integers(0, 600), st.integers(1, 8))
def test_shares_are_even_but_for_the_text(start: int, more: int, text: int, ranks: int) -> None:
    stop = start + ranks - 1 + more
    bounds = share_bounds(start, stop, text, ranks)
    assert (bounds[0], bounds[-1], len(bounds)) == (start, stop, ranks + 1)
    lengths = [last - first for first, last in pairwise(bounds)]
    assert min(lengths) >= 1
    if ranks > 1:
        loads = [lengths[0] + text, *lengths[1:]]
        assert max(lengths[1:]) - min(lengths[1:]) <= 1
        assert max(loads) - min(loads) <= 1 or lengths[0] == 1


@pytest.mark.parametrize("name", LISTED)
def test_shared_patches_equal_the_definition(ranks: RankPool, name: str) -> None:
    for first, second, stale in ranks.run(strays, name, 2, 2, shares=2, world_size=4, timeout=180):
        assert max(first, second) <= 1e-5
        assert stale > 1e-4, "nothing was stale, so nothing was seen"


@pytest.mark.parametrize("name", ["Wan, a timestep for each token", "Flux Kontext"])
def test_shared_patches_of_other_pipelines(ranks: RankPool, name: str) -> None:
    for first, second, _ in ranks.run(strays, name, 2, 3, shares=2, world_size=4, timeout=180):
        assert max(first, second) <= 1e-5


def test_three_share_uneven_patches(ranks: RankPool) -> None:
    for first, second, _ in ranks.run(strays, "Flux", 2, 3, shares=3, world_size=6, timeout=180):
        assert max(first, second) <= 1e-5


@torch.no_grad()
def exact(name: str, options: dict[str, int]) -> float:
    pipeline = build(name)
    with fused(pipeline, 2, shares=2, **options):
        return distance(picture(pipeline(**arguments(name, pipeline))), alone(name))


@pytest.mark.parametrize(
    "options", [{"patches": 2, "warmup_steps": STEPS}, {"patches": 1}], ids=["warm-up", "one"]
)
@pytest.mark.parametrize("name", LISTED)
def test_shared_exact_steps_and_whole_calls_are_exact(
    ranks: RankPool, name: str, options: dict[str, int]
) -> None:
    for found in ranks.run(exact, name, options, world_size=4, timeout=180):
        assert found <= 1e-5


@torch.no_grad()
def counted(name: str) -> dict[str, Any]:
    """What the third patched step of a request adds, in a pipeline that has run before."""
    pipeline = build(name)
    lengths: list[tuple[int, int]] = []
    with fused(pipeline, 2, shares=2, patches=2) as handle:
        (partition,) = handle.partitions.values()
        block = partition.blocks_of(partition.stage)[0][1]
        watch = block.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append(
                (kwargs["hidden_states"].shape[1], kwargs["encoder_hidden_states"].shape[1])
            ),
            with_kwargs=True,
        )
        traffic = []
        for steps in (3, 4, 5):
            lengths.clear()
            with record_traffic() as one:
                pipeline(**arguments(name, pipeline, num_inference_steps=steps))
            traffic.append(one)
        watch.remove()
        return {
            "bytes": traffic[2].bytes_sent["all_gather"] - traffic[1].bytes_sent["all_gather"],
            "metadata": traffic[2].calls["metadata"] - traffic[1].calls["metadata"],
            "lengths": lengths,
            "width": pipeline.transformer.inner_dim,
            "out": pipeline.transformer.proj_out.out_features,
            "attentions": len(partition.blocks_of(partition.stage)),
            "cache": handle.cache_bytes,
        }


def test_ranks_give_each_other_fresh_keys_alone(ranks: RankPool) -> None:
    counts = ranks.run(counted, "Flux", world_size=4, timeout=180)
    branches, patches, size = 2, 2, 4
    exact = [counts[rank]["lengths"][0] for rank in (0, 1)]
    tokens, text = sum(length for length, _ in exact), exact[0][1]
    assert abs(exact[0][0] + text - exact[1][0]) <= 1, "the text is no part of the first's share"
    for rank, found in enumerate(counts):
        own = [length for length, _ in found["lengths"][-patches:]]
        assert [words for _, words in found["lengths"][-patches:]] == [
            text if rank % 2 == 0 else 1,
            1,
        ]
        assert max(own) < tokens / patches
        assert found["metadata"] == 0
        kept = found["attentions"] * 2 * (tokens + text) * found["width"] * size
        assert found["cache"] == branches * kept
        sent = found["attentions"] * 2 * (sum(own) + text * (rank % 2 == 0)) * found["width"]
        head = sum(own) * found["out"] if rank >= 2 else 0
        assert found["bytes"] == branches * (sent + head) * size


@torch.no_grad()
def refusals(name: str) -> list[str]:
    """Of ranks that disagree, and of patches with fewer tokens than ranks."""
    said = []
    pipeline = build(name)
    for patches in (2 + torch.distributed.get_rank() % 2, 9):
        try:
            with fused(pipeline, 2, shares=2, patches=patches):
                pipeline(**arguments(name, pipeline, height=32, width=32))
        except ParallelError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_what_cannot_be_shared_is_refused(ranks: RankPool) -> None:
    for differs, small in ranks.run(refusals, "Flux", world_size=4, timeout=180):
        assert differs.startswith("RankMismatchError: rank of a stage 1 was given another")
        assert "patches=2" in differs
        assert "patches=3" in differs
        assert small.startswith("ParallelConfigError: a call of transformer has 4 image tokens")
        assert "patches=9 for 2 ranks each; legal here: 1 to 2" in small


@torch.no_grad()
def own_seeds(name: str, given: bool) -> Tensor:
    """A picture of which each rank has random numbers of its own."""
    pipeline = build(name)
    seed = torch.distributed.get_rank()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed) if given else None
    with fused(pipeline, 2, shares=2):
        return picture(pipeline(**arguments(name, pipeline, generator=generator)))


@pytest.mark.parametrize("given", [True, False], ids=["generators", "torch's own"])
def test_all_ranks_take_the_random_numbers_of_the_first(ranks: RankPool, given: bool) -> None:
    first, *others = ranks.run(own_seeds, "Flux", given, world_size=4, timeout=180)
    assert all(torch.equal(first, other) for other in others)
