"""Unmodified pipelines of diffusers give the single process's picture on stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepened_pipelines import LISTED, build
from stock_pipelines import CASES, picture
from toy_stages import stages

from omni_group_coordinator import ParallelConfigError
from omni_pp.partition import find_block_lists
from rank_harness import RankPool

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:In CPU autocast:UserWarning"
)


@torch.no_grad()
def both(name: str, world: int, options: dict[str, Any]) -> tuple[float, float, int]:
    """Largest difference of twice the picture on stages, relative; and blocks of this rank."""
    case = CASES[name]
    alone = build(name)
    expected = picture(alone(**case.arguments(alone)))
    pipeline = build(name)
    model = getattr(pipeline, case.denoisers[0])
    lists = [one.name for one in find_block_lists(model)]
    with stages(pipeline, world, **options):
        differences = []
        for _ in range(2):
            found = picture(pipeline(**case.arguments(pipeline)))
            assert type(found) is torch.Tensor
            difference = (found.double() - expected.double()).abs().max()
            differences.append(float(difference / expected.abs().max()))
        held = sum(len(list(model.get_submodule(one).children())) for one in lists)
    return differences[0], differences[1], held


REFUSED = ("Hunyuan-DiT, rescaled", "HiDream", "Chroma", "Cosmos", "Cosmos 2", "Kandinsky 6")
REFUSED += ("Motif-Video", "LTX-2, four branches")
BY_POSITION = (
    "Stable Diffusion 3, layers skipped",
    "HunyuanImage, three branches",
    "HunyuanImage, three branches once",
)
OTHERS = tuple(
    name
    for name, case in CASES.items()
    if name not in LISTED + REFUSED + BY_POSITION and "unet" not in case.denoisers
)


@pytest.mark.parametrize(("world", "virtual"), [(2, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("name", LISTED)
def test_listed_models_on_two_and_three_stages(
    ranks: RankPool, name: str, world: int, virtual: int
) -> None:
    options = {"virtual_stages": virtual}
    for first, second, held in ranks.run(both, name, world, options, world_size=world, timeout=180):
        assert held > 0
        assert max(first, second) <= 1e-5


@pytest.mark.parametrize("name", OTHERS)
def test_others_on_two_stages(ranks: RankPool, name: str) -> None:
    for first, second, held in ranks.run(both, name, 2, {}, timeout=180):
        assert held > 0
        assert max(first, second) <= 1e-5


def refusal(name: str) -> str:
    try:
        pipeline = build(name)
        with stages(pipeline, 2):
            picture(pipeline(**CASES[name].arguments(pipeline)))
    except ParallelConfigError as error:
        return str(error)
    return "none"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_refused(ranks: RankPool, name: str) -> None:
    first, second = ranks.run(refusal, name, timeout=180)
    assert first == second
    assert "stages" in first


@pytest.mark.parametrize("name", BY_POSITION)
def test_layers_that_are_left_out_by_position_are_refused(ranks: RankPool, name: str) -> None:
    for text in ranks.run(refusal, name, timeout=180):
        assert "by position" in text or "position in the whole list" in text
