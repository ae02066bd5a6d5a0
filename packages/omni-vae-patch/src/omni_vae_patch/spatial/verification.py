"""A tiny latent, decoded and encoded on shards and whole, and compared module by module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omni_group_coordinator import GroupCoordinator, ParallelConfigError
from omni_vae_patch.agreement import agreed
from omni_vae_patch.spatial.exact_vae import ExactVae
from omni_vae_patch.spatial.geometry import (
    extra_arguments,
    kept_random_state,
    random_latent,
)
from omni_vae_patch.spatial.partition import HEIGHT, best_partition
from omni_vae_patch.spatial.whole_outputs import sharded_tensor

_LOW_PRECISION = 5e-2
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4}


def differs(found: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by more than rounding; relative to the largest value."""
    if found.shape != expected.shape:
        return True
    if not expected.numel():
        return False
    tolerance = _TOLERANCES.get(expected.dtype, _LOW_PRECISION)
    largest = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return not bool((found - expected).abs().max() <= tolerance * largest)


@dataclass(frozen=True)
class Difference:
    """Where a call on a shard first differs from that of the whole.

    Attributes:
        order: How many modules had ended before.
        name: The module, or the one whose own code lies between the modules within it.
        between: Whether it is that code: what a module within was given differs already.
    """

    order: int
    name: str
    between: bool


class ModuleOutputs:
    """What all modules are given and give in one call, or what of it differs in a second one."""

    def __init__(self, vae: nn.Module) -> None:
        self._vae = vae
        self._whole: defaultdict[str, list[tuple[Tensor | None, Tensor | None]]] = defaultdict(list)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record a call of the whole."""

        def record(name: str, given: Tensor | None, output: Tensor | None) -> None:
            self._whole[name].append((given, output))

        with self._hooks(record):
            yield

    @contextmanager
    def compared(self, dim: int, start: int, rows: int, total: int) -> Iterator[list[Difference]]:
        """Compare a call on a shard; gives what differs, in order."""
        calls: defaultdict[str, int] = defaultdict(int)
        found: list[Difference] = []
        ended = 0

        def same(whole: Tensor | None, local: Tensor | None) -> bool:
            if whole is None or local is None:
                return whole is local
            if whole.shape != local.shape and whole.ndim >= 2 and whole.shape[dim] % total == 0:
                factor = whole.shape[dim] // total
                first = min(start * factor, whole.shape[dim])
                whole = whole.narrow(dim, first, min(rows * factor, whole.shape[dim] - first))
            elif whole.shape != local.shape:
                return True  # tokens, or padded: compared where they are rows again
            return not differs(local, whole)

        def compare(name: str, given: Tensor | None, output: Tensor | None) -> None:
            # On this rank alone nothing may be raised here: the others would wait for it.
            nonlocal ended
            index = calls[name]
            calls[name] += 1
            ended += 1
            if index >= len(self._whole[name]):
                found.append(Difference(ended, name, between=False))
                return
            before, after = self._whole[name][index]
            if not same(after, output):
                between = not same(before, given)
                where = name.rpartition(".")[0] if between else name
                found.append(Difference(ended, where, between))

        with self._hooks(compare):
            yield found

    @contextmanager
    def _hooks(self, note: Any) -> Iterator[None]:
        handles = []
        for name, module in self._vae.named_modules():
            if name:

                def hook(_: Any, args: Any, output: Any, name: str = name) -> None:
                    note(name, _first(args), _first(output))

                handles.append(module.register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _first(value: Any) -> Tensor | None:
    """The first tensor of what a module is given or gives."""
    while isinstance(value, tuple | list) and value:
        value = value[0]
    return value.detach() if isinstance(value, Tensor) else None


@torch.no_grad()
def verify(vae: Any, exact: ExactVae, group: GroupCoordinator) -> None:
    """Compare an autoencoder on shards with itself.

    Args:
        vae: The autoencoder, rules applied.
        exact: Makes its calls.
        group: The ranks.

    Raises:
        ParallelConfigError: On every rank: it differs; names the first module that does.
    """
    geometry = exact.geometry
    even = group.world_size * max(2, geometry.least)
    # First shards of one size: where a module does not take them, every rank says so at once.
    for side, sides in ((even, exact.dims), (even + 1, exact.dims[:1])):
        latent = random_latent(vae, geometry.channels, geometry.is_video, side)
        with kept_random_state(latent.device):
            more = extra_arguments(vae, latent)
            sample = _verified("decode", vae, exact, group, sides, latent, more)
            if hasattr(vae, "encode"):
                _verified("encode", vae, exact, group, sides, sample, {})


def _verified(
    method: str,
    vae: Any,
    exact: ExactVae,
    group: GroupCoordinator,
    dims: tuple[int, ...],
    x: Tensor,
    more: dict[str, Any],
) -> Tensor:
    trace = ModuleOutputs(vae)
    torch.manual_seed(0)
    with trace.recorded():
        whole = agreed(
            group,
            f"one rank's {method} of a tiny latent",
            lambda: sharded_tensor(exact.whole(method, x, **more)),
        )
    side = whole.shape[-1] if method == "encode" else x.shape[-1]
    me = group.rank_in_group
    for dim in dims:
        torch.manual_seed(0)
        partition = best_partition(side, side, group.world_size, (dim,), exact.geometry.least)
        with trace.compared(dim, partition.start(me), partition.rows[me], side) as wrong:
            found = sharded_tensor(exact.along(method, x, partition, **more))
        same = not differs(found, whole)
        _judge(vae, group, f"{method}s", dim, [] if not partition.rows[me] else wrong, same)
    return whole


def _judge(
    vae: Any,
    group: GroupCoordinator,
    does: str,
    dim: int,
    wrong: list[Difference],
    same: bool,
) -> None:
    mine = [[one.order, one.name, one.between] for one in wrong[:1]]
    said = group.all_gather_object([same, mine])
    if all(one for one, _ in said):
        return
    side = "height" if dim == HEIGHT else "width"
    found = sorted(one for _, ones in said for one in ones)  # on whichever rank it is seen first
    _, name, between = found[0] if found else (0, "", True)
    kind = type(vae.get_submodule(name)).__name__
    if not name:
        what = f"it is the code of {kind} itself, between its modules, that"
    elif between:
        what = f"it is the code of module {name!r}, a {kind}, between the modules within it, that"
    else:
        what = f"module {name!r}, a {kind}, is the first that"
    msg = (
        f"{type(vae).__name__} {does} otherwise when its {side} is sharded: {what} differs; "
        "register a rule for its class (omni_vae_patch.register_rule), or use mode='tile'"
    )
    raise ParallelConfigError(msg)
