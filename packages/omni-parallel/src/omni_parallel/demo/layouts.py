"""Layouts that the demonstration can run: their strategies and their names."""

from __future__ import annotations

from dataclasses import fields

from omni_parallel_state import ParallelLayout

STRATEGIES = {
    "hsdp": ("fs",),
    "pp": ("pp",),
    "sp": ("ulysses", "ring"),
    "cfgp": ("cfg",),
    "vae_patch": ("vae",),
}
"""Degrees of a layout that each strategy serves, in the order in which strategies are applied.

Calls stand in layers, the later around the earlier: guidance divides calls that go through stages.
"""

_SAID = {"fs": "hsdp", "vae": "vae_patch"}  # they say what the ranks do with it

DEGREES = {
    _SAID.get(field.name, field.name): field.name
    for field in fields(ParallelLayout)
    if field.name in sum(STRATEGIES.values(), ())
}
"""Degrees of a layout by the names that ``--layout`` has for them, in its order."""

OVERLAYS = tuple(_SAID.values())
"""Degrees that add no ranks to those of the others."""


def strategies_of(layout: ParallelLayout) -> tuple[str, ...]:
    """Strategies that a layout needs, in the order in which to apply them."""
    return tuple(
        name
        for name, degrees in STRATEGIES.items()
        if any(getattr(layout, degree) > 1 for degree in degrees)
    )


def layout_name(layout: ParallelLayout) -> str:
    """A layout as ``--layout`` takes it, without degrees of 1; ``single`` for one process."""
    degrees = {name: getattr(layout, degree) for name, degree in DEGREES.items()}
    return ", ".join(f"{name}={n}" for name, n in degrees.items() if n > 1) or "single"
