"""MochiTransformer3DModel on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import (
    MODES,
    TOLERANCE,
    ModelCase,
    compare,
    every_mode,
    randomised,
    relative_error,
    seeded,
)
from torch import nn

from omni_parallel_state import ParallelLayout, ParallelState
from omni_sp import SequenceParallelConfig, apply_sequence_parallel

diffusers = pytest.importorskip("diffusers")


def build() -> nn.Module:
    return diffusers.MochiTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=32,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=8,
    )


def call(grid: tuple[int, int, int], text: int, valid: list[int]) -> dict[str, Any]:
    frames, height, width = grid
    batch = len(valid)
    return {
        "hidden_states": seeded(batch, 4, frames, 2 * height, 2 * width),
        "encoder_hidden_states": seeded(batch, text, 24),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": torch.arange(text) < torch.tensor(valid)[:, None],
        "return_dict": False,
    }


CASE = ModelCase(
    build,
    {
        "even": lambda: call((2, 2, 4), 8, [8]),
        "odd": lambda: call((3, 3, 3), 7, [7, 4]),
        "less text than ranks": lambda: call((1, 3, 3), 7, [1]),
        "no text": lambda: call((1, 3, 5), 7, [0, 5]),
        "less video than ranks": lambda: call((1, 1, 1), 7, [7, 3]),
    },
)


# The model asks for autocast to float32, which CPUs do not have.
@pytest.mark.filterwarnings("ignore:In CPU autocast")
@every_mode
def test_mochi(ranks: Any, mode: str) -> None:
    compare(ranks, CASE, mode)


def compiled(mode: str) -> float:
    """The valid text of a sample is of a length that a trace does not know."""
    ulysses, ring, exchange = MODES[mode]
    model = randomised(build())
    state = ParallelState(ParallelLayout(ulysses=ulysses, ring=ring))
    config = SequenceParallelConfig(ulysses, ring, kv_exchange=exchange)  # type: ignore[arg-type]
    calls = [call((3, 3, 3), 7, valid) for valid in ([7, 4], [2, 7], [0, 5])]
    with torch.no_grad():
        expected = [model(**arguments) for arguments in calls]
        with apply_sequence_parallel(model, config, state=state):
            run = torch.compile(model, fullgraph=True, backend="aot_eager")
            found = [run(**calls[0])]
            with torch.compiler.set_stance("fail_on_recompile"):
                found += [run(**arguments) for arguments in calls[1:]]
    return max(map(relative_error, found, expected))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("mode", ["ulysses 2", "ring 2"])
def test_mochi_is_one_graph_for_texts_of_any_length(ranks: Any, mode: str) -> None:
    assert max(ranks.run(compiled, mode, timeout=110)) <= TOLERANCE
