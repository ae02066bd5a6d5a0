"""A pipeline's VAE, which only the ranks that have something to decode shall run."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import Tensor

from omni_parallel_state.current import find_parallel_state
from omni_pp.async_latents import resolved

_MARK = "_omni_pp_guard"


class Undecoded(NamedTuple):
    """What a stage gets that does not decode: it equals ``(None,)``."""

    sample: Any = None


def guard_decode(vae: Any) -> None:
    """Let one stage alone decode, of an autoencoder that is not distributed itself.

    Over stages, ``decode`` then runs on the first one; others get ``(None,)``. One that is
    distributed runs on all, on the latents of the first. It is if it says so itself
    (``is_distributed_enabled``), or if ``decode`` is replaced on the object, as it is by what
    divides an autoencoder over ranks; that may be done before or later.

    Args:
        vae: The autoencoder; what has no ``decode``, or is guarded already, is left alone.
    """
    decode = getattr(vae, "decode", None)
    if not callable(decode) or hasattr(decode, _MARK):
        return
    was_replaced = "decode" in vae.__dict__

    @functools.wraps(decode)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        state = find_parallel_state()
        is_outermost = vae.__dict__.get("decode") is guarded
        if state is None or state.destroyed or state.pp.world_size == 1 or not is_outermost:
            return decode(*args, **kwargs)
        args, kwargs = resolved(args), resolved(kwargs)
        if was_replaced or _is_distributed(vae):
            if state.pp.world_size > 2:  # stages in the middle may have old latents
                args, kwargs = _from_first(state.pp, args), _from_first(state.pp, kwargs)
            return decode(*args, **kwargs)
        return decode(*args, **kwargs) if state.pp.rank_in_group == 0 else Undecoded()

    setattr(guarded, _MARK, True)
    vae.decode = guarded


def _is_distributed(vae: Any) -> bool:
    asked = getattr(vae, "is_distributed_enabled", None)
    return bool(callable(asked) and asked())


def _from_first(stages: Any, given: Any) -> Any:
    """The arguments, with the first stage's content in tensors."""

    def shared(value: Any) -> Any:
        return stages.broadcast(value.clone()) if isinstance(value, Tensor) else value

    if isinstance(given, dict):
        return {key: shared(given[key]) for key in sorted(given)}
    return tuple(map(shared, given))
