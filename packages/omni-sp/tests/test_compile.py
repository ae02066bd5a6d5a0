"""A hooked model is one graph for torch.compile, in every mode, and compiles once per shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_flux import RTOL, flux, inputs, relative_error

from omni_parallel_state import ParallelLayout, ParallelState
from omni_sp import SequenceParallelConfig, apply_sequence_parallel

MODES = {
    "ulysses": (2, 1, "ring"),
    "ring": (1, 2, "ring"),
    "allgather": (1, 2, "allgather"),
}


def compile_it(kind: str, mode: str) -> tuple[float, int, int]:
    """The largest error, and the graphs compiled for the first shape and for a second one."""
    from torch._dynamo.testing import CompileCounterWithBackend

    ulysses, ring, exchange = MODES[mode]
    model = flux()
    state = ParallelState(ParallelLayout(ulysses=ulysses, ring=ring))
    config = SequenceParallelConfig(ulysses, ring, kv_exchange=exchange)  # type: ignore[arg-type]
    calls = [inputs(3, 5, 5), inputs(4, 4, 7, batch=2)]
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = model
    with torch.no_grad():
        expected = [model(**call)[0] for call in calls]
        apply_sequence_parallel(model, config, state=state)
        if kind == "model":
            compiled = torch.compile(model, fullgraph=True, backend=counter)
        else:
            for block in (*model.transformer_blocks, *model.single_transformer_blocks):  # type: ignore[misc]
                block.compile(fullgraph=True, backend=counter)
        errors = [relative_error(compiled(**calls[0])[0], expected[0])]
        first = counter.frame_count
        with torch.compiler.set_stance("fail_on_recompile"):
            errors.append(relative_error(compiled(**calls[0])[0], expected[0]))
        errors.append(relative_error(compiled(**calls[1])[0], expected[1]))
        both = counter.frame_count
        with torch.compiler.set_stance("fail_on_recompile"):
            for index in (0, 1, 1, 0):
                errors.append(relative_error(compiled(**calls[index])[0], expected[index]))
    return max(errors), first, both - first


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "graphs"), [("model", 1), ("blocks", 3)])
def test_one_graph_for_each_shape_and_the_same_result(
    ranks: Any, kind: str, graphs: int, mode: str
) -> None:
    for error, first, second in ranks.run(compile_it, kind, mode):
        assert error < RTOL
        assert first == graphs
        assert second <= graphs


def compiled_before() -> float:
    model = flux()
    state = ParallelState(ParallelLayout(ulysses=2))
    call = inputs(3, 5, 5)
    with torch.no_grad():
        expected = model(**call)[0]
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        compiled(**call)
        with apply_sequence_parallel(model, SequenceParallelConfig(2), state=state):
            found = relative_error(compiled(**call)[0], expected)
        return max(found, relative_error(compiled(**call)[0], expected))


def test_a_model_that_was_compiled_before_is_traced_anew(ranks: Any) -> None:
    assert max(ranks.run(compiled_before)) < RTOL


def check_the_operator(mode: str) -> None:
    from omni_sp import Segment
    from omni_sp.attention import ParallelAttention
    from omni_sp.attention.operator import register

    ulysses, ring, exchange = MODES[mode]
    state = ParallelState(ParallelLayout(ulysses=ulysses, ring=ring))
    config = SequenceParallelConfig(ulysses, ring, kv_exchange=exchange)  # type: ignore[arg-type]
    attention = ParallelAttention(state.sp, config)
    segment = Segment(6)
    numbers = [segment.length, 0, 0, 1]
    query, value = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 4)
    mask = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    arguments = (query, query, value, mask, register(attention), numbers, numbers, False, None)
    torch.library.opcheck(torch.ops.omni_sp.attend.default, arguments)


@pytest.mark.parametrize("mode", MODES)
def test_the_operator_passes_opcheck(ranks: Any, mode: str) -> None:
    ranks.run(check_the_operator, mode)
