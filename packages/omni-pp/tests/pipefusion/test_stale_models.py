"""Patches on stages give what one process makes of the definition, for every class of models."""

from __future__ import annotations

import pytest
import torch
from deepened_pipelines import LISTED, build
from pipefusion_cases import alone, arguments, distance, fused
from stale_reference import StaleReference
from stock_pipelines import CASES, picture

from rank_harness import RankPool

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:In CPU autocast:UserWarning"
)


@torch.no_grad()
def strays(name: str, world: int, patches: int, virtual: int) -> tuple[float, float, float]:
    """Differences of two requests from the definition; and of the definition from the exact one."""
    case = CASES[name]
    reference = build(name)
    for part in case.denoisers:
        StaleReference(getattr(reference, part), patches, 1, case.calls_per_step)
    expected = picture(reference(**arguments(name, reference)))
    pipeline = build(name)
    found = []
    with fused(pipeline, world, patches=patches, virtual=virtual):
        for _ in range(2):
            result = picture(pipeline(**arguments(name, pipeline)))
            found.append(distance(result, expected))
    return found[0], found[1], distance(expected, alone(name))


@pytest.mark.parametrize(("world", "patches", "virtual"), [(2, 2, 1), (3, 3, 1), (2, 3, 2)])
@pytest.mark.parametrize("name", LISTED)
def test_patches_equal_the_definition(
    ranks: RankPool, name: str, world: int, patches: int, virtual: int
) -> None:
    for first, second, stale in ranks.run(
        strays, name, world, patches, virtual, world_size=world, timeout=180
    ):
        assert max(first, second) <= 1e-5
        assert stale > 1e-4, "nothing was stale, so nothing was seen"


@pytest.mark.parametrize(("world", "patches", "virtual"), [(3, 2, 1), (4, 2, 1), (2, 5, 2)])
@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_fewer_patches_than_stages_and_many_more(
    ranks: RankPool, name: str, world: int, patches: int, virtual: int
) -> None:
    for first, second, _ in ranks.run(
        strays, name, world, patches, virtual, world_size=world, timeout=180
    ):
        assert max(first, second) <= 1e-5


OTHERS = (
    "Wan, two experts",
    "Wan, a timestep for each token",
    "Flux Kontext",
    "PixArt Sigma",
    "CogVideoX, stochastic",
)


@pytest.mark.parametrize("name", OTHERS)
def test_other_pipelines_of_these_models(ranks: RankPool, name: str) -> None:
    for first, second, stale in ranks.run(strays, name, 2, 2, 1, timeout=180):
        assert max(first, second) <= 1e-5
        assert stale > 1e-4
