"""Where PipeFusion is exact, what it keeps and sends, and that it leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepened_pipelines import LISTED, build
from pipefusion_cases import STEPS, alone, arguments, distance, fused
from stale_reference import StaleReference
from stock_pipelines import picture

from omni_group_coordinator import record_traffic
from rank_harness import RankPool

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:In CPU autocast:UserWarning"
)


@torch.no_grad()
def exact(name: str, options: dict[str, int]) -> tuple[float, float]:
    """Differences from the exact result, while it is applied and after it was removed."""
    expected = alone(name)
    pipeline = build(name)
    with fused(pipeline, 2, **options):
        found = picture(pipeline(**arguments(name, pipeline)))
    after = picture(pipeline(**arguments(name, pipeline)))
    return distance(found, expected), distance(after, expected)


@pytest.mark.parametrize(
    "options", [{"patches": 2, "warmup_steps": STEPS}, {"patches": 1}], ids=["warm-up", "one"]
)
@pytest.mark.parametrize("name", LISTED)
def test_exact_steps_and_whole_calls_are_exact(
    ranks: RankPool, name: str, options: dict[str, int]
) -> None:
    for found, after in ranks.run(exact, name, options, timeout=180):
        assert found <= 1e-5
        assert after == 0


@torch.no_grad()
def other_sizes(name: str, sizes: list[int]) -> tuple[list[float], list[int], list[int]]:
    """Differences of requests in a row from the definition, cache bytes, and lengths of patches."""
    pipeline = build(name)
    differences, held, lengths = [], [], []
    with fused(pipeline, 2, patches=3) as handle:
        ((partition,),) = [tuple(handle.partitions.values())]
        block = partition.blocks_of(partition.stage)[0][1]
        watch = block.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append(kwargs["hidden_states"].shape[1]),
            with_kwargs=True,
        )
        for seed, size in enumerate(sizes):
            more = {"height": size, "width": size, "generator": torch.Generator().manual_seed(seed)}
            found = picture(pipeline(**arguments(name, pipeline, **more)))
            more["generator"] = torch.Generator().manual_seed(seed)
            reference = build(name)
            StaleReference(reference.transformer, 3, 1, 2)
            expected = picture(reference(**arguments(name, reference, **more)))
            differences.append(distance(found, expected))
            held.append(handle.cache_bytes)
        watch.remove()
    assert handle.cache_bytes == 0
    return differences, held, lengths


def test_requests_of_other_shapes_start_anew(ranks: RankPool) -> None:
    small, large = 32, 64
    for differences, held, _ in ranks.run(other_sizes, "Flux", [small, large, small], timeout=180):
        assert max(differences) <= 1e-5
        assert held[0] == held[2] < held[1]


@torch.no_grad()
def count(name: str, steps: int, pipeline: Any) -> Any:
    with record_traffic() as traffic:
        pipeline(**arguments(name, pipeline, num_inference_steps=steps))
    return traffic


@torch.no_grad()
def bytes_of_a_step(name: str, patches: int) -> dict[str, Any]:
    """What the third patched step of a request adds, in a pipeline that has run before."""
    pipeline = build(name)
    seen: dict[str, Any] = {}
    with fused(pipeline, 2, patches=patches) as handle:
        count(name, 3, pipeline)
        fewer, more = count(name, 4, pipeline), count(name, 5, pipeline)
        model = pipeline.transformer
        hook = model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(
                tokens=max(seen.get("tokens", 0), kwargs["hidden_states"].shape[1]),
                text=max(seen.get("text", 0), kwargs["txt_ids"].shape[0]),
            ),
            with_kwargs=True,
        )
        pipeline(**arguments(name, pipeline))
        hook.remove()
        (partition,) = handle.partitions.values()
        return {
            "bytes": more.bytes_sent["send channel"] - fewer.bytes_sent["send channel"],
            "metadata": more.calls["metadata"] - fewer.calls["metadata"],
            "calls": more.total_calls - fewer.total_calls,
            "width": model.inner_dim,
            "out": model.proj_out.out_features,
            "cache": handle.cache_bytes,
            "blocks": len(partition.blocks_of(partition.stage)),
            **seen,
        }


@pytest.mark.parametrize("patches", [2, 3])
def test_bytes_sent_and_kept_are_the_arithmetic(ranks: RankPool, patches: int) -> None:
    branches, status, size = 2, 1, 4
    first, last = ranks.run(bytes_of_a_step, "Flux", patches, timeout=180)
    tokens, text, width = first["tokens"], first["text"], first["width"]
    assert tokens > patches
    # All text goes with the first patch, one token of it with each later one.
    flow = (tokens + text + patches - 1) * width * size + patches * status
    assert first["bytes"] == branches * flow
    assert last["bytes"] == branches * (tokens * last["out"] * size + patches * status)
    for rank in (first, last):
        assert rank["metadata"] == 0
        kept = rank["blocks"] * 2 * (tokens + text) * width * size
        assert rank["cache"] == branches * kept


def test_uneven_patches(ranks: RankPool) -> None:
    differences, _, lengths = ranks.run(other_sizes, "Flux", [64], timeout=180)[0]
    tokens = max(lengths)
    own = [length for length in lengths if length < tokens][:3]
    assert tokens % 3 != 0
    assert sorted(own, reverse=True) == own
    assert max(differences) <= 1e-5


def test_one_rank_is_the_identity() -> None:
    pipeline = build("Flux")
    cls = type(pipeline)
    with fused(pipeline, 1, patches=4) as handle:
        assert type(pipeline) is cls
        assert handle.cache_bytes == 0
        assert not handle.partitions


def left_behind(case: str) -> list[str]:
    """What differs after the handle was removed."""
    pipeline = build(case)
    model, scheduler = pipeline.transformer, type(pipeline.scheduler)
    names = [name for name, module in model.named_modules() if hasattr(module, "processor")]
    before = {name: model.get_submodule(name).processor for name in names}
    classes = {name: type(module) for name, module in model.named_modules()}
    kinds = {name: type(one) for name, one in before.items()}
    with fused(pipeline, 2):
        pass
    after = {name: model.get_submodule(name).processor for name in names}
    found = [name for name in names if after[name] is not before[name]]
    found += [name for name in names if type(after[name]) is not kinds[name]]
    found += [name for name, module in model.named_modules() if type(module) is not classes[name]]
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, "forward" in vars(module))
        found += [f"hooks of {name}"] if any(hooks) else []
    return found + ([] if type(pipeline.scheduler) is scheduler else ["scheduler"])


@pytest.mark.parametrize("name", ["Flux", "Z-Image", "Stable Diffusion 3"])
def test_nothing_is_left_behind(ranks: RankPool, name: str) -> None:
    assert ranks.run(left_behind, name, timeout=180) == [[], []]


@torch.no_grad()
def failing_stage(name: str, at_first: bool) -> tuple[str, float]:
    """The error of a request in which a patch fails on stage 1, and the next one's difference."""
    pipeline = build(name)
    reference = build(name)
    StaleReference(reference.transformer, 2, 1, 2)
    expected = picture(reference(**arguments(name, reference)))

    longest = 0

    def fail(_: Any, args: Any, kwargs: Any) -> None:
        nonlocal longest
        length = kwargs["hidden_states"].shape[1]
        longest = max(longest, length)  # that of an exact step
        if length < longest:
            raise ZeroDivisionError

    with fused(pipeline, 2) as handle:
        if not at_first:
            pipeline(**arguments(name, pipeline))
        (partition,) = handle.partitions.values()
        block = partition.blocks_of(1)[0][1]
        hook = block.register_forward_pre_hook(fail, with_kwargs=True)
        try:
            pipeline(**arguments(name, pipeline))
        except Exception as error:
            text = f"{type(error).__name__} {error}"
        hook.remove()
        found = picture(pipeline(**arguments(name, pipeline)))
    return text, distance(found, expected)


@pytest.mark.parametrize("at_first", [True, False])
def test_every_rank_hears_of_a_patch_that_failed(ranks: RankPool, at_first: bool) -> None:
    first, last = ranks.run(failing_stage, "Flux", at_first, timeout=120)
    assert "stage 1 failed: ZeroDivisionError" in first[0]
    assert last[0].startswith("ZeroDivisionError")
    assert max(first[1], last[1]) <= 1e-5
