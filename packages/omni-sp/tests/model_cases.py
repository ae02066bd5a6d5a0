"""What the tests of stock models share: small models, inputs, and the comparison over ranks.

A family's test module builds a `ModelCase` for each class and hands it to `compare`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omni_parallel_state import ParallelLayout, ParallelState
from omni_sp import SequenceParallelConfig, apply_sequence_parallel

TOLERANCE = 1e-5

MODES: dict[str, tuple[int, int, str]] = {
    "ulysses 2": (2, 1, "ring"),
    "ring 2": (1, 2, "ring"),
    "allgather 2": (1, 2, "allgather"),
    "ulysses 2 x ring 2": (2, 2, "ring"),
}
"""Ulysses degree, ring degree, and what the latter's ranks do with keys and values."""

every_mode = pytest.mark.parametrize("mode", MODES)


@dataclass(frozen=True)
class ModelCase:
    """One class of models and the calls on which it must equal itself on several ranks."""

    build: Callable[[], nn.Module]
    """Makes a small model; `compare` gives it random weights, the same on every rank."""
    calls: dict[str, Callable[[], dict[str, Any]]] = field(default_factory=dict)
    """By name ("even", "odd", ...): makes the arguments of a call, the same on every rank."""


def seeded(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Random values that depend on shape and seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def randomised(model: nn.Module, seed: int = 7, std: float = 0.15) -> nn.Module:
    """The model with weights under which attention matters: fresh adaLN layers are too tame."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            nn.init.normal_(parameter, std=std)
    return model.eval()


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of a model's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [tensor for item in output for tensor in tensors_of(item)]


def relative_error(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest value of what was expected."""
    worst = 0.0
    for one, other in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert one.shape == other.shape
        assert one.dtype is other.dtype
        error = ((one - other).abs().max() / other.abs().max()).item()
        assert not math.isnan(error)
        worst = max(worst, error)
    return worst


def errors_on_this_rank(case: ModelCase, mode: tuple[int, int, str]) -> dict[str, float]:
    """Runs on each rank: the error of each call, on one hooked model, one call after another."""
    ulysses, ring, exchange = mode
    model = randomised(case.build())
    state = ParallelState(ParallelLayout(ulysses=ulysses, ring=ring))
    config = SequenceParallelConfig(ulysses, ring, kv_exchange=exchange)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = {name: model(**make()) for name, make in case.calls.items()}
        before = {name: type(module) for name, module in model.named_modules()}
        handle = apply_sequence_parallel(model, config, state=state)
        found = {name: model(**make()) for name, make in case.calls.items()}
        handle.remove()
        assert {name: type(module) for name, module in model.named_modules()} == before
        first = next(iter(case.calls))
        again = model(**case.calls[first]())
    state.destroy()
    assert relative_error(again, expected[first]) == 0, "not the original after remove"
    return {name: relative_error(found[name], expected[name]) for name in case.calls}


def compare(ranks: Any, case: ModelCase, mode: str) -> None:
    """Every call of the case gives on the ranks of a mode what it gives on one process."""
    ulysses, ring, _ = MODES[mode]
    for rank, errors in enumerate(
        ranks.run(errors_on_this_rank, case, MODES[mode], world_size=ulysses * ring)
    ):
        for name, error in errors.items():
            assert error <= TOLERANCE, f"{name} call, rank {rank}: relative error {error:.1e}"
