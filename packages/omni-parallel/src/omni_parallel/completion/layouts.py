"""Layouts that complete what was typed; torch, which `ParallelConfig` needs, is not imported."""

from __future__ import annotations

import click

DEGREES = (
    "dp",
    "cfg",
    "ulysses",
    "ring",
    "pp",
    "pipefusion",
    "hsdp",
    "hsdp_replicate",
    "vae_patch",
)
MODES = ("auto", "exact", "tile")
_USUAL = ("2", "4", "8")


def complete_layout(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Layouts that begin with what was typed, with one more degree: ``cfg=2,ulysses=2``."""
    before, comma, typed = incomplete.rpartition(",")
    given = {part.partition("=")[0] for part in before.split(",")}
    values = dict.fromkeys(DEGREES, _USUAL) | {"vae_mode": MODES}
    found = [
        f"{before}{comma}{name}={value}"
        for name, legal in values.items()
        if name not in given
        for value in legal
        if f"{name}={value}".startswith(typed)
    ]
    return found + [name for name in ("auto",) if name.startswith(incomplete)]
