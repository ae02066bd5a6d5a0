"""What is the same for all patches of a call is computed for the first one alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepened_pipelines import LISTED, build
from pipefusion_cases import arguments, fused
from stock_pipelines import CASES

from omni_pp.pipefusion.application import plan_of
from omni_pp.pipefusion.computed_once import modules_at
from rank_harness import RankPool

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:In CPU autocast:UserWarning"
)
STEPS, PATCHES = 3, 3

LACKING = {
    "Wan": {
        "condition_embedder.image_embedder",
        "blocks.*.attn2.to_kv",
        "blocks.*.attn2.add_k_proj",
        "blocks.*.attn2.add_v_proj",
        "blocks.*.attn2.norm_added_k",
    },
    "LTX-Video, rescaled": {"transformer_blocks.*.attn2.to_kv"},
    "PixArt Alpha": {"transformer_blocks.*.attn2.to_kv", "transformer_blocks.*.attn2.norm_k"},
}
"""What these models have only with other options."""


@pytest.mark.parametrize("name", LISTED)
def test_the_names_are_those_of_modules(name: str) -> None:
    model = build(name).transformer
    plan = plan_of(model)
    patterns = (*plan.once, *plan.once_in_a_step, *plan.words)
    assert {one for one in patterns if not modules_at(model, one)} == LACKING.get(name, set())


def count_calls(model: torch.nn.Module, patterns: tuple[str, ...]) -> Counter[str]:
    """Counts calls of modules from now on."""
    counts: Counter[str] = Counter()
    names = {module: name for name, module in model.named_modules()}

    def counted(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return forward(*args, **kwargs)

        return call

    for pattern in patterns:
        for module in modules_at(model, pattern):
            module.forward = counted(names[module], module.forward)  # type: ignore[method-assign]
    return counts


@torch.no_grad()
def calls(name: str) -> tuple[Counter[str], Counter[str]]:
    """Of modules that are the same for all patches of a call, and that are unless times differ."""
    pipeline = build(name)
    model = pipeline.transformer
    plan = plan_of(model)
    same = count_calls(model, (*plan.once, *plan.words))
    timed = count_calls(model, plan.once_in_a_step)
    with fused(pipeline, 2, patches=PATCHES):
        pipeline(**arguments(name, pipeline, num_inference_steps=STEPS))
    return same, timed


@pytest.mark.parametrize("name", LISTED)
def test_once_for_each_call(ranks: RankPool, name: str) -> None:
    own = []
    for same, timed in ranks.run(calls, name, timeout=120):
        assert set(same.values()) == {STEPS * CASES[name].calls_per_step}
        assert set(timed.values()) <= {STEPS * CASES[name].calls_per_step}
        own.append({one for one in same if ".0." in one})
    assert not own[0] & own[1], "blocks of one stage are not those of the other"


def test_a_timestep_for_each_token_differs_from_patch_to_patch(ranks: RankPool) -> None:
    name = "Wan, a timestep for each token"
    each = CASES[name].calls_per_step
    for same, timed in ranks.run(calls, name, timeout=120):
        assert set(same.values()) == {STEPS * each}
        assert set(timed.values()) == {(1 + (STEPS - 1) * PATCHES) * each}
