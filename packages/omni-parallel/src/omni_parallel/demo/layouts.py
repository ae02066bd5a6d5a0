"""Layouts that the demonstration can run: their strategies and their names."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from omni_parallel_state import ParallelLayout


@dataclass(frozen=True)
class FusedLayout(ParallelLayout):
    """A layout whose stages work on patches of one picture: an approximation."""


STRATEGIES = {
    "pp": ("pp",),
    "pipefusion": ("pp",),
    "hsdp": ("fs",),
    "sp": ("ulysses", "ring"),
    "cfgp": ("cfg",),
    "vae_patch": ("vae",),
}
"""Degrees of a layout that each strategy serves, in the order in which strategies are applied.

Calls stand in layers, the later around the earlier: guidance divides calls that go through stages.
The ranks of a stage share the weights that it holds, so it is cut before.
Stages are those of ``pp``, or of ``pipefusion`` in a `FusedLayout`.
"""

FUSED = "pipefusion"

_SAID = {"fs": "hsdp", "vae": "vae_patch"}  # they say what the ranks do with it

DEGREES = {
    name: field.name
    for field in fields(ParallelLayout)
    if field.name in sum(STRATEGIES.values(), ())
    for name in (_SAID.get(field.name, field.name), *([FUSED] if field.name == "pp" else ()))
}
"""Degrees of a layout by the names that ``--layout`` has for them, in its order."""

OVERLAYS = tuple(_SAID.values())
"""Degrees that add no ranks to those of the others."""


def strategies_of(layout: ParallelLayout) -> tuple[str, ...]:
    """Strategies that a layout needs, in the order in which to apply them."""
    other = "pp" if is_fused(layout) else FUSED
    return tuple(
        name
        for name, degrees in STRATEGIES.items()
        if name != other and any(getattr(layout, degree) > 1 for degree in degrees)
    )


def options_of(layout: ParallelLayout, strategy: str) -> dict[str, Any]:
    """What a strategy is told beyond the layout.

    As many patches as there are stages keep all of these busy. The pictures are compared here, so
    settings are not refused that stray far.
    """
    return {"patches": layout.pp, "force": True} if strategy == FUSED else {}


def is_fused(layout: ParallelLayout) -> bool:
    """Whether what a layout gives is an approximation."""
    return isinstance(layout, FusedLayout) and layout.pp > 1


def layout_name(layout: ParallelLayout) -> str:
    """A layout as ``--layout`` takes it, without degrees of 1; ``single`` for one process."""
    other = "pp" if is_fused(layout) else FUSED
    degrees = {name: getattr(layout, field) for name, field in DEGREES.items() if name != other}
    return ", ".join(f"{name}={n}" for name, n in degrees.items() if n > 1) or "single"
