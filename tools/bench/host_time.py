"""What the host does for each layer, measured with a backend that sends nothing.

One process pretends to be rank 0 of several: torch's fake backend returns at once from every
collective, so what is left is Python, dispatch and the copies of a handful of tokens. Times are
CPU seconds of the thread, which other processes on the machine don't lengthen.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.arithmetic import pairwise_difference, spread
from bench.contestants import Contestant
from bench.counts import DispatchCount
from bench.harness import Progress
from bench.models import build, inputs, shorten, twin
from bench.results import HostCost, HostResult
from bench.shims import without_accelerator

TOKENS: Final = 40
LAYERS: Final = 6
HEAD_DIM: Final = 16
_SINGLE: Final = "single"
_WARM_UP: Final = 3
_REAL_TOKENS: Final = 320
_REAL_LAYERS: Final = 9

Call = Callable[[], Any]


@torch.no_grad()
def host_case(
    progress: Progress,
    family: str,
    ranks: int,
    contestants: Sequence[Contestant],
    rounds: int,
) -> HostResult:
    """Measure all contestants on one model, in this process alone."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    alone = _world_of_one(family, rounds)
    progress.step()
    with _fake_group(ranks), without_accelerator(), _attention_as_one_kernel_on_meta():
        on_cpu, counts, problems = _measure(family, ranks, contestants, rounds, "cpu")
        progress.step()
        on_meta, _, meta_problems = _measure(family, ranks, contestants, rounds, "meta")
        progress.step()
    problems = {**meta_problems, **problems}
    costs = tuple(
        _cost(contestant.name, on_cpu, on_meta, counts, problems) for contestant in contestants
    )
    single = counts[_SINGLE]
    return HostResult(
        model=f"{family}, {LAYERS} layers",
        ranks=ranks,
        layer_microseconds=spread(on_cpu[_SINGLE]).median / LAYERS * 1e6,
        layer_kernels=single.kernels / LAYERS,
        costs=costs,
        alone_microseconds=alone[0] * 1e6 if alone else None,
        alone_share=alone[0] / alone[1] if alone else None,
    )


STEPS: Final = 3
"""Steps of progress that `host_case` makes."""


class _Count:
    """Operators of a forward, and of its last layer alone, from the second call on.

    In the first the ranks agree that all of them will go on.
    """

    def __init__(self, call: Call, shorter: Call) -> None:
        call()
        shorter()
        with DispatchCount() as whole:
            call()
        with DispatchCount() as without:
            shorter()
        self.kernels = whole.kernels.total()
        self.layer_communication = dict(Counter(whole.communication) - without.communication)


def _cost(
    name: str,
    on_cpu: dict[str, list[float]],
    on_meta: dict[str, list[float]],
    counts: dict[str, _Count],
    problems: dict[str, str],
) -> HostCost:
    added = {}
    for device, seconds in (("cpu", on_cpu), ("meta", on_meta)):
        if name in seconds:
            difference = pairwise_difference(seconds[name], seconds[_SINGLE]).median
            added[device] = difference / LAYERS * 1e6
    count = counts.get(name)
    return HostCost(
        name,
        microseconds=added.get("cpu"),
        meta_microseconds=added.get("meta"),
        kernels=None if count is None else (count.kernels - counts[_SINGLE].kernels) / LAYERS,
        collectives=None if count is None else count.layer_communication,
        problem=problems.get(name),
    )


def _measure(
    family: str, ranks: int, contestants: Sequence[Contestant], rounds: int, device: str
) -> tuple[dict[str, list[float]], dict[str, _Count], dict[str, str]]:
    """CPU seconds by round, operators, and why some could not run.

    The single process works on one rank's tokens, so that the layers' own work is the same.
    """
    model = build(family, LAYERS, head_dim=HEAD_DIM).to(device)
    shorter = shorten(family, model)
    part, whole = (_on(device, inputs(family, TOKENS // n)) for n in (ranks, 1))
    calls: dict[str, Call] = {_SINGLE: lambda: model(**part)}
    counts = {_SINGLE: _Count(calls[_SINGLE], lambda: shorter(**part))}
    problems: dict[str, str] = {}
    undo: list[Call] = []
    for contestant in contestants:
        split, short = twin(model), twin(shorter)
        try:
            undo += [contestant.apply(split, device), contestant.apply(short, device)]
            call = _bind(split, whole)
            counts[contestant.name] = _Count(call, _bind(short, whole))
        except Exception as error:  # the others are measured all the same
            text = " ".join(str(error).split())
            problems[contestant.name] = f"on {device}: {type(error).__name__}: {text}"
            continue
        calls[contestant.name] = call
    seconds = _race(calls, rounds)
    for each in reversed(undo):
        each()
    return seconds, counts, problems


def _race(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(_WARM_UP + rounds):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            if turn >= _WARM_UP:
                seconds[name].append(time.thread_time() - start)
    return seconds


def _world_of_one(family: str, rounds: int) -> tuple[float, float] | None:
    """Seconds that hooks add to a forward at world size 1, and those of a forward without."""
    model = build(family, LAYERS, head_dim=HEAD_DIM)
    hooked, arguments = twin(model), inputs(family, TOKENS)
    try:
        undo = Contestant("omni-sp", "world 1").apply(hooked)
        seconds = _race(
            {_SINGLE: _bind(model, arguments), "hooked": _bind(hooked, arguments)}, 2 * rounds
        )
        undo()
    except Exception:
        return None
    real = build(family, _REAL_LAYERS)
    forward = _race({_SINGLE: _bind(real, inputs(family, _REAL_TOKENS))}, 3)[_SINGLE]
    added = pairwise_difference(seconds["hooked"], seconds[_SINGLE]).median
    return added, spread(forward).median


def _bind(model: nn.Module, arguments: dict[str, Any]) -> Call:
    return lambda: model(**arguments)


def _on(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


@contextmanager
def _fake_group(ranks: int) -> Iterator[None]:
    """Be rank 0 of a world whose collectives return at once, for the CPU and the meta device."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    devices = {"fake": [*dist.Backend.backend_capability["fake"], "meta"]}
    with mock.patch.dict(dist.Backend.backend_capability, devices):
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()


@contextmanager
def _attention_as_one_kernel_on_meta() -> Iterator[None]:
    """Let attention be one operator on the meta device, as it is on every real one.

    Else torch takes it apart there, at a millisecond for each call of
    `scaled_dot_product_attention` and not for its fused kernels, which Ring calls directly.
    """

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask
        )[0]
        return out

    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    # Not library.impl, which refuses this operator, as its parts have meta kernels of their own.
    library.m.impl("scaled_dot_product_attention", "Meta", attention, False)
    try:
        yield
    finally:
        library._destroy()
