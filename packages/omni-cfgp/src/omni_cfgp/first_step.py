"""The first step of a request, in which the ranks compare their latents."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor

from omni_cfgp.cfg_config import Seeds
from omni_cfgp.signature import fingerprint, same_inputs
from omni_group_coordinator import GroupCoordinator, RankMismatchError

_times: WeakKeyDictionary[Any, ref[Any]] = WeakKeyDictionary()


def is_first_step(scheduler: Any) -> bool:
    """Whether this is the first step since the scheduler was given its timesteps.

    Of a scheduler without any: whether this is its first step at all. By the identity of the
    tensor, for its values are on the device.
    """
    times = getattr(scheduler, "timesteps", None)
    marker = times if isinstance(times, Tensor) else scheduler
    seen = _times.get(scheduler)
    if seen is not None and seen() is marker:
        return False
    _times[scheduler] = ref(marker)
    return True


def agreed_latents(group: GroupCoordinator, latents: Any, seeds: Seeds) -> Any:
    """The latents of the first step, the same on every rank.

    Args:
        group: The ranks of one image.
        latents: A tensor, or a tuple of tensors.
        seeds: What to do where they differ.

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
            "the ranks of one image have different latents in the first step: seed their "
            'generators alike, or set cfg_seeds = "broadcast" to go on with those of the first'
        )
        raise RankMismatchError(msg)
    shared = tuple(group.broadcast(tensor.clone()) for tensor in tensors)
    return shared if isinstance(latents, tuple) else shared[0]
