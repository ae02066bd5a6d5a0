"""Where to cut, so that no part costs much more than another."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from omni_group_coordinator import ParallelConfigError
from omni_pp.partition.block_lists import find_block_lists

_OF_SOME = re.compile(r"(^|[._])(norm\w*|mod|modulation|adaln\w*|context|add|txt)([._]|$)")


def cut_blocks(costs: Sequence[float], parts: int) -> tuple[int, ...]:
    """Cut a row of blocks so that the costliest part is as cheap as it can be.

    Exact, by dynamic programming. Of several such cuts it is the one with the most even parts.

    Args:
        costs: Of each block, at least zero.
        parts: How many; each gets at least one block.

    Returns:
        ``parts + 1`` boundaries, from 0 to ``len(costs)``.

    Raises:
        ParallelConfigError: There are fewer blocks than parts, or a cost is not a number.
    """
    count = len(costs)
    if not 1 <= parts <= count:
        legal = f"1 to {count}" if count else "none"
        msg = (
            f"{count} blocks cannot be cut into {parts} parts with a block in each; legal: {legal}"
        )
        raise ParallelConfigError(msg)
    bad = [(i, cost) for i, cost in enumerate(costs) if not (math.isfinite(cost) and cost >= 0)]
    if bad:
        msg = f"the cost of block {bad[0][0]} is {bad[0][1]}; costs are finite and at least 0"
        raise ParallelConfigError(msg)
    before = [0.0, *accumulate(costs)]
    smallest, _ = _best(before, parts, lambda part: part, max)
    # Sums of the same floats, so that the comparison is exact.
    _, boundaries = _best(
        before, parts, lambda part: part**2 if part <= smallest else math.inf, lambda a, b: a + b
    )
    return boundaries


def _best(
    before: Sequence[float],
    parts: int,
    price: Callable[[float], float],
    join: Callable[[float, float], float],
) -> tuple[float, tuple[int, ...]]:
    """The cheapest way to cut, where `join` sums up the prices of the parts."""
    count = len(before) - 1
    best: list[tuple[float, tuple[int, ...]]] = [
        (price(before[end]), (0, end)) for end in range(count + 1)
    ]
    for part in range(1, parts):
        longer: list[tuple[float, tuple[int, ...]]] = [(math.inf, ())] * (count + 1)
        for end in range(part + 1, count + 1):
            for start in range(part, end):
                total = join(best[start][0], price(before[end] - before[start]))
                if total < longer[end][0] or not longer[end][1]:
                    longer[end] = (total, (*best[start][1], end))
        best = longer
    return best[count]


def parameter_costs(blocks: Sequence[nn.Module]) -> list[float]:
    """A cost of each block from the sizes of its matrices, which is what one token costs.

    Without those that see one vector for a whole sample (modulation), and without those of a
    second stream, of text: a token goes through the weights of one stream. Told by the names that
    diffusers gives them. The quadratic term of attention is ignored: where that matters, measure
    (`measure_block_costs`).
    """
    matrices = [
        [(name.replace("_orig_mod.", ""), one) for name, one in block.named_parameters()]
        for block in blocks
    ]
    for counts in (_is_of_every_token, _is_matrix, lambda name, one: True):
        costs = [sum(p.numel() for n, p in found if counts(n, p)) for found in matrices]
        if any(costs):
            return [float(cost) or 1.0 for cost in costs]
    return [1.0] * len(blocks)


def _is_matrix(_: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1


def _is_of_every_token(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and _OF_SOME.search(name) is None


def measure_block_costs(
    model: nn.Module, call: Callable[[], Any], *, block_lists: Sequence[str] = ()
) -> list[float]:
    """Time each block of a whole model during one call.

    Ranks measure different times: use the numbers of one rank on all, or they cut differently.

    Args:
        model: The model, whole, on the device that it will run on.
        call: Calls it once, as it will be called; let it have been called before, to be warm.
        block_lists: As for `find_block_lists`.

    Returns:
        Seconds for each block, for ``partition_model(balance=...)``.

    Raises:
        ParallelConfigError: A block was not called, or as for `find_block_lists`.
    """
    lists = find_block_lists(model, block_lists)
    named = [
        (f"{one.name}.{key}", block)
        for one in lists
        for key, block in model.get_submodule(one.name).named_children()
    ]
    clock = [_BlockClock(block) for _, block in named]
    try:
        call()
    finally:
        for one in clock:
            one.stop()
    idle = [name for (name, _), one in zip(named, clock, strict=True) if not one.calls]
    if idle:
        msg = f"the call did not reach {len(idle)} of {len(named)} blocks, the first is {idle[0]}"
        raise ParallelConfigError(msg)
    return [one.seconds for one in clock]


class _BlockClock:
    """Sums up the time in one block."""

    def __init__(self, block: nn.Module) -> None:
        self.seconds, self.calls, self._since = 0.0, 0, 0.0
        self._hooks = (
            block.register_forward_pre_hook(self._begin, prepend=True),
            block.register_forward_hook(self._end),
        )

    def _begin(self, block: nn.Module, args: Any) -> None:
        self._since = _now(block)

    def _end(self, block: nn.Module, args: Any, output: Any) -> None:
        self.seconds += _now(block) - self._since
        self.calls += 1

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _now(block: nn.Module) -> float:
    device = next((one.device for one in block.parameters()), torch.device("cpu"))
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
