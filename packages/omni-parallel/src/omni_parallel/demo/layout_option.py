"""The options ``--layout`` and ``--ranks``: what each rank of the parallel run does."""

from __future__ import annotations

import re
from math import prod

import click

from omni_group_coordinator import ParallelConfigError
from omni_parallel.demo.layouts import (
    DEGREES,
    FUSED,
    OVERLAYS,
    FusedLayout,
    layout_name,
)
from omni_parallel.demo.request import BLOCKS, GUIDANCE_BRANCHES
from omni_parallel_state import ParallelLayout

MAX_RANKS = 64
DEFAULT_RANKS = 2
_FORM = "name=degree, several of them joined by commas, such as cfg=2,ulysses=2"


def parse_layout(text: str) -> ParallelLayout:
    """The layout that a text such as ``cfg=2,ulysses=2`` describes.

    Raises:
        click.BadParameter: With the nearest legal values.
    """
    degrees: dict[str, int] = {}
    for part in text.split(","):
        name, degree = _parse_part(part.strip(), text)
        if name in degrees:
            msg = f"{name} is given twice in {text!r}; legal: once, such as {name}={degree}"
            raise click.BadParameter(msg)
        degrees[name] = degree
    _check_together(degrees)
    try:
        fields = {DEGREES[name]: degree for name, degree in degrees.items()}
        kind = FusedLayout if degrees.get(FUSED, 1) > 1 else ParallelLayout
        layout = kind(**fields)  # type: ignore[arg-type]  # its order is no number
    except ParallelConfigError as error:
        raise click.BadParameter(_as_options(str(error), FUSED in degrees)) from None
    _check_branches(layout)
    _check_blocks(layout, FUSED if FUSED in degrees else "pp")
    _check_ranks(layout, degrees)
    return layout


def choose_layout(ranks: int | None, layout: ParallelLayout | None) -> ParallelLayout:
    """The layout of the parallel run.

    Args:
        ranks: Of ``--ranks``, which are ranks of Ulysses; None if it was not given.
        layout: Of ``--layout``; None if it was not given.

    Raises:
        click.BadParameter: The two contradict each other.
    """
    if layout is None:
        return ParallelLayout(ulysses=DEFAULT_RANKS if ranks is None else ranks)
    if ranks not in (None, layout.world_size):
        msg = (
            f"{ranks}, but --layout has {layout.world_size} ({layout_name(layout)}); legal here: "
            f"{layout.world_size}, or leave --ranks out"
        )
        raise click.BadParameter(msg, param_hint="--ranks")
    return layout


def _parse_part(part: str, text: str) -> tuple[str, int]:
    if not part:
        where = f"an empty part in {text!r}" if text.strip() else "an empty layout"
        msg = f"{where}; legal: {_FORM}"
        raise click.BadParameter(msg)
    name, equals, degree = (piece.strip() for piece in part.partition("="))
    if name not in DEGREES:
        msg = f"{name!r} is no degree that the demonstration knows; legal: {', '.join(DEGREES)}"
        raise click.BadParameter(msg)
    if not equals:
        msg = f"{name} has no degree in {text!r}; nearest: {name}=2"
        raise click.BadParameter(msg)
    # Stricter than int(), which takes 1_0 and digits of other scripts, and fails on very long ones.
    if re.fullmatch(r"-?[0-9]{1,9}", degree) is None:
        msg = f"{name}={degree} is no number of ranks; legal: a whole number from 1 to {MAX_RANKS}"
        raise click.BadParameter(msg)
    return name, int(degree)


def _as_options(text: str, fused: bool) -> str:
    """A message about degrees of a layout, with the names that they have here."""
    text = text.replace(" with replicate=1", "")  # of which the demonstration has none
    for name, degree in DEGREES.items():
        if name == FUSED and not fused:
            continue
        text = re.sub(rf"\b{degree}\b", name, text)
    return text


_APART = {
    (FUSED, "pp"): "both cut the model into stages",
    (FUSED, "cfg"): "patches follow each other through both guidance branches of one rank",
    (FUSED, "ring"): "patches are cut from all tokens of the picture, of which a rank has a part",
    (
        FUSED,
        "ulysses",
    ): "patches are cut from all tokens of the picture, of which a rank has a part",
    (FUSED, "hsdp"): "both leave a rank a part of the weights",
}
"""Degrees that do not go together, and why."""


def _check_together(degrees: dict[str, int]) -> None:
    twice = {FUSED, "pp"} <= degrees.keys()  # one degree of the layout, whatever they are
    on = {name: degree for name, degree in degrees.items() if degree > 1 or twice}
    for (one, other), why in _APART.items():
        if one in on and other in on:
            choices = []
            for name in (one, other):
                apart = {x for pair in _APART if name in pair for x in pair}
                beside = ", ".join(each for each in DEGREES if each not in apart)
                choices.append(f"{name}={on[name]}, with any of {beside}")
            msg = f"{one} and {other} do not go together: {why}; legal: {'; or '.join(choices)}"
            raise click.BadParameter(msg)


def _check_blocks(layout: ParallelLayout, name: str) -> None:
    if layout.pp > BLOCKS:
        msg = (
            f"{name}={layout.pp}: the demonstration's model has {BLOCKS} blocks, so that further "
            f"stages would have none; legal: 1 to {BLOCKS}"
        )
        raise click.BadParameter(msg)


def _check_branches(layout: ParallelLayout) -> None:
    if layout.cfg > GUIDANCE_BRANCHES:
        msg = (
            f"cfg={layout.cfg}: the demonstration's model has {GUIDANCE_BRANCHES} guidance "
            "branches, one for the prompt and one for the negative prompt, so that further ranks "
            f"would have none; legal: {', '.join(map(str, range(1, GUIDANCE_BRANCHES + 1)))}"
        )
        raise click.BadParameter(msg)


def _check_ranks(layout: ParallelLayout, degrees: dict[str, int]) -> None:
    if layout.world_size <= MAX_RANKS:
        return
    nearest = {name: degree for name, degree in degrees.items() if name not in OVERLAYS}
    while prod(nearest.values()) > MAX_RANKS:
        largest = max(nearest, key=lambda name: nearest[name])
        others = prod(nearest.values()) // nearest[largest]
        nearest[largest] = max(1, MAX_RANKS // others)
    ranks = prod(nearest.values())
    ranks = MAX_RANKS if ranks == 1 else ranks  # alone overlays make up the ranks themselves
    for name in OVERLAYS:
        if name in degrees:
            fitting = [n for n in range(1, ranks + 1) if ranks % n == 0 and n <= degrees[name]]
            nearest[name] = fitting[-1]
    msg = (
        f"{layout_name(layout)} is {layout.world_size} ranks; legal: up to {MAX_RANKS}; "
        f"nearest: {','.join(f'{name}={degree}' for name, degree in nearest.items())}"
    )
    raise click.BadParameter(msg)
