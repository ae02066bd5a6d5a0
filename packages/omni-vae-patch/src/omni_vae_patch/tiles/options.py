"""The tiling of an autoencoder, turned on for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omni_group_coordinator import ParallelConfigError

_SWITCHES = ("use_tiling", "use_framewise_encoding", "use_framewise_decoding")


def tiling_options(vae: Any) -> dict[str, Any]:
    """What an autoencoder lets one set about its tiles, and to what it is set.

    The switches ``use_tiling``, ``use_framewise_encoding`` and ``use_framewise_decoding`` where
    it has them, and its ``tile_...`` numbers. Empty for an autoencoder that knows no tiles.
    """
    names = [name for name in vars(vae) if name.startswith("tile_") or name in _SWITCHES]
    return {name: getattr(vae, name) for name in names}


@contextmanager
def enabled_tiling(vae: Any, *, scale: float | None = None, **options: Any) -> Iterator[None]:
    """Turn on an autoencoder's own tiling, and restore all its settings afterwards.

    Args:
        vae: The autoencoder.
        scale: Factor on all heights, widths and strides of its tiles, which keeps their
            relations; each must stay a whole number.
        **options: Values for names of `tiling_options`; they take precedence.

    Raises:
        ParallelConfigError: It knows no tiles, or not these options, or they cannot be scaled.
    """
    before = tiling_options(vae)
    name = type(vae).__qualname__
    if "use_tiling" not in before:
        msg = f"a {name} has no tiling of its own; use the exact spatial mode, or one rank"
        raise ParallelConfigError(msg)
    unknown = sorted(set(options) - set(before))
    if unknown:
        msg = f"a {name} has no tiling options {unknown}; it has: {', '.join(sorted(before))}"
        raise ParallelConfigError(msg)
    wanted = {"use_tiling": True} | _scaled(name, before, scale) | options
    try:
        for key, value in wanted.items():
            setattr(vae, key, value)
        yield
    finally:
        for key, value in before.items():
            setattr(vae, key, value)


def _scaled(name: str, before: dict[str, Any], scale: float | None) -> dict[str, int]:
    if scale is None:
        return {}
    found = {}
    for key, value in before.items():
        if not key.endswith(("_height", "_width", "_size")) or not isinstance(value, int):
            continue
        if value * scale != int(value * scale) or value * scale < 1:
            msg = (
                f"scale={scale} makes {key}={value} of a {name} {value * scale}, which is no "
                "length; name the lengths one by one instead"
            )
            raise ParallelConfigError(msg)
        found[key] = int(value * scale)
    return found
