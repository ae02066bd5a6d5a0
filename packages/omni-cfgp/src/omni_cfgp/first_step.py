"""The first step of a request, in which the ranks compare their latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor

from omni_group_coordinator import GroupCoordinator, RankMismatchError
from omni_parallel_state.denoising.requests import Seeds
from omni_parallel_state.denoising.signature import fingerprint, same_inputs


class FirstSteps:
    """Tells the first step of each request from the others.

    A scheduler is given new timesteps for each, and is asked for the identity of that tensor, for
    its values are on the device. Of a scheduler without any: its first step at all.
    """

    def __init__(self) -> None:
        self._times: WeakKeyDictionary[Any, ref[Any]] = WeakKeyDictionary()

    def is_first(self, scheduler: Any) -> bool:
        """Whether this is the first time since the scheduler was given its timesteps."""
        times = getattr(scheduler, "timesteps", None)
        marker = times if isinstance(times, Tensor) else scheduler
        seen = self._times.get(scheduler)
        if seen is not None and seen() is marker:
            return False
        self._times[scheduler] = ref(marker)
        return True


def agreed_inputs(
    group: GroupCoordinator, branches: Sequence[dict[str, Any]], seeds: Seeds
) -> list[dict[str, Any]]:
    """The inputs of the branches in the first step, the same on every rank.

    Args:
        group: The ranks of one image.
        branches: Arguments of each branch.
        seeds: What to do where tensors differ.

    Raises:
        RankMismatchError: On every rank: they differ, and that was to be an error.
    """
    found = []
    for branch in branches:
        names = sorted(name for name, value in branch.items() if isinstance(value, Tensor))
        tensors = agreed_latents(group, tuple(branch[name] for name in names), seeds, "inputs")
        found.append(branch | dict(zip(names, tensors, strict=True)))
    return found


def agreed_latents(
    group: GroupCoordinator, latents: Any, seeds: Seeds, what: str = "latents"
) -> Any:
    """The latents of the first step, the same on every rank.

    Args:
        group: The ranks of one image.
        latents: A tensor, or a tuple of tensors.
        seeds: What to do where they differ.
        what: What they are, for the message.

    Raises:
        RankMismatchError: On every rank: they differ, and that was to be an error.
    """
    tensors = latents if isinstance(latents, tuple) else (latents,)
    said = group.all_gather_object([fingerprint(tensors, {}), [list(t.shape) for t in tensors]])
    (first, shapes), *others = said
    alike = all(same_inputs(first, one) for one, _ in others)
    if alike:
        return latents
    if seeds == "error" or any(shape != shapes for _, shape in others):
        msg = (
            f"the ranks of one image have different {what} in the first step: seed their "
            'generators alike, or set cfg_seeds = "broadcast" to go on with those of the first'
        )
        raise RankMismatchError(msg)
    shared = tuple(group.broadcast(tensor.clone()) for tensor in tensors)
    return shared if isinstance(latents, tuple) else shared[0]
