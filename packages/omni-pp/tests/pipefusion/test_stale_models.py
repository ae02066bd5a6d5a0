"""Patches on stages give what one process makes of the definition, for every class of models."""

from __future__ import annotations

import pytest
from deepened_pipelines import LISTED
from pipefusion_cases import strays

from rank_harness import RankPool

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:In CPU autocast:UserWarning"
)


@pytest.mark.parametrize(("world", "patches", "virtual"), [(2, 2, 1), (3, 3, 1), (2, 3, 2)])
@pytest.mark.parametrize("name", LISTED)
def test_patches_equal_the_definition(
    ranks: RankPool, name: str, world: int, patches: int, virtual: int
) -> None:
    for first, second, stale in ranks.run(
        strays, name, world, patches, virtual=virtual, world_size=world, timeout=180
    ):
        assert max(first, second) <= 1e-5
        assert stale > 1e-4, "nothing was stale, so nothing was seen"


@pytest.mark.parametrize(("world", "patches", "virtual"), [(3, 2, 1), (4, 2, 1), (2, 5, 2)])
@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_fewer_patches_than_stages_and_many_more(
    ranks: RankPool, name: str, world: int, patches: int, virtual: int
) -> None:
    for first, second, _ in ranks.run(
        strays, name, world, patches, virtual=virtual, world_size=world, timeout=180
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
    for first, second, stale in ranks.run(strays, name, 2, 2, timeout=180):
        assert max(first, second) <= 1e-5
        assert stale > 1e-4
