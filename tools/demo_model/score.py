"""Checks that a picture shows what its caption asked for.

Objects are found by colour, told apart by outline and compared by place. No model is involved, so
that the check is the same for any picture.
"""

from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from demo_model.grammar import COLOURS, SHAPES, Request, Thing, parse
from demo_model.shapes import Drawn, coverage

COLOUR_REACH: Final = 80.0
"""Largest distance in RGB space at which a pixel still counts as a colour."""
BACKGROUND_REACH: Final = 60.0
"""A pixel closer than this to the background belongs to no object."""
LEAST_AREA: Final = 0.004
"""Least area of an object, as a share of the square on the picture's shorter side."""
LEAST_STEP: Final = 0.15
"""Least distance between two objects along the relation's axis, in units of the shorter side."""
SMALL_BELOW: Final = {False: 0.40, True: 0.28}
"""Diameter that separates small from large, by "is one of two", in units of the shorter side."""
LEAST_LINE: Final = 2
"""A row with fewer pixels is more often a stray than a part of the object."""
MIDDLE_GREY: Final = 128.0
HALF: Final = 0.5
_TEMPLATE_SIDE: Final = 32


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome for one picture."""

    problems: tuple[str, ...]
    """What is wrong, in words; empty for a picture that shows its caption."""

    @property
    def passed(self) -> bool:
        """Tell whether nothing is wrong."""
        return not self.problems


@dataclass(frozen=True, kw_only=True)
class _Found:
    mask: Tensor
    """The object's own bounding box, cut out and scaled to a fixed size."""
    x: float
    y: float
    diameter: float


def _span(hits: Tensor) -> tuple[int, int] | None:
    places = (hits >= LEAST_LINE).nonzero().flatten()
    return (int(places[0]), int(places[-1]) + 1) if len(places) else None


def _find(mask: Tensor) -> _Found | None:
    unit = min(mask.shape)
    rows, columns = _span(mask.sum(dim=1)), _span(mask.sum(dim=0))
    if rows is None or columns is None or mask.sum() < LEAST_AREA * unit**2:
        return None
    box = mask[slice(*rows), slice(*columns)].float()[None, None]
    scaled = nn.functional.interpolate(
        box, (_TEMPLATE_SIDE, _TEMPLATE_SIDE), mode="bilinear", antialias=True
    )
    return _Found(
        mask=scaled[0, 0],
        x=sum(columns) / 2 / unit,
        y=sum(rows) / 2 / unit,
        diameter=max(rows[1] - rows[0], columns[1] - columns[0]) / unit,
    )


@cache
def _templates() -> Tensor:
    templates = []
    for shape in SHAPES:
        drawn = Drawn(shape=shape, x=0.5, y=0.5, radius=0.3, colour=(0, 0, 0))
        found = _find(coverage([drawn], 128, 128)[0] > HALF)
        if found is None:
            msg = f"The renderer drew nothing for the shape {shape!r}."
            raise AssertionError(msg)
        templates.append(found.mask)
    return torch.stack(templates)


def shape_of(found: _Found) -> str:
    """Name the shape whose outline overlaps best."""
    templates = _templates()
    overlap = torch.minimum(templates, found.mask).sum(dim=(1, 2))
    union = torch.maximum(templates, found.mask).sum(dim=(1, 2))
    return SHAPES[int((overlap / union).argmax())]


def _without_strays(mask: Tensor) -> Tensor:
    """Drop lines thinner than three pixels: the mixed colours of an outline may look like a third.

    What lies beside something thicker stays, or the points of a small star would be lost.
    """
    thin = nn.functional.max_pool2d(1 - mask.float()[None, None], 3, 1, 1)
    near = nn.functional.max_pool2d(1 - thin, 9, 1, 4)[0, 0] > HALF
    return mask & near


def _segment(picture: Image.Image) -> tuple[dict[str, Tensor], Tensor]:
    """Return one mask for each colour, and the background's colour."""
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32).copy())
    frame = torch.cat([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = frame.median(dim=0).values
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    distances = torch.linalg.vector_norm(pixels[:, :, None] - palette, dim=-1)
    least, nearest = distances.min(dim=-1)
    off = torch.linalg.vector_norm(pixels - background, dim=-1) > BACKGROUND_REACH
    solid = (least < COLOUR_REACH) & off
    return {
        name: _without_strays(solid & (nearest == i)) for i, name in enumerate(COLOURS)
    }, background


def _halves(mask: Tensor, request: Request) -> list[Tensor]:
    """Split the mask of two objects of one colour in the middle, the caption's first one first."""
    axis = 1 if request.relation in ("left", "right") else 0
    places = mask.any(dim=1 - axis).nonzero().flatten()
    if not len(places):
        return [mask, mask]
    middle = int(places[0] + places[-1]) // 2
    before = mask.clone()
    before.narrow(axis, middle, mask.shape[axis] - middle).zero_()
    halves = [before, mask & ~before]
    return halves if request.relation in ("left", "above") else halves[::-1]


def _masks(request: Request, colours: dict[str, Tensor]) -> list[Tensor]:
    masks = [colours[thing.colour] for thing in request.things]
    if request.relation and request.things[0].colour == request.things[1].colour:
        return _halves(masks[0], request)
    return masks


def _thing_problems(thing: Thing, found: _Found, paired: bool) -> list[str]:
    problems = []
    shape = shape_of(found)
    if shape != thing.shape:
        problems.append(f"the {thing.colour} object is a {shape}, not a {thing.shape}")
    if thing.size and (found.diameter < SMALL_BELOW[paired]) != (thing.size == "small"):
        problems.append(f"the {thing.colour} {thing.shape} is not {thing.size}")
    return problems


def _relation_problems(request: Request, found: list[_Found]) -> list[str]:
    if request.relation is None:
        return []
    across, down = found[1].x - found[0].x, found[1].y - found[0].y
    along = {"left": across, "right": -across, "above": down, "below": -down}[request.relation]
    other = down if request.relation in ("left", "right") else across
    if along < max(LEAST_STEP, abs(other)):
        return [f"the first object is not {request.relation} of the second"]
    return []


def _colour_problems(request: Request, colours: dict[str, Tensor]) -> list[str]:
    asked = {thing.colour for thing in request.things}
    return [
        f"there is something {name}"
        for name, mask in colours.items()
        if name not in asked and mask.sum() > LEAST_AREA * min(mask.shape) ** 2
    ]


def check(picture: Image.Image, caption: str) -> Verdict:
    """Compare a picture with a caption of the grammar.

    Raises:
        ValueError: `caption` is not a sentence of the grammar.
    """
    request = parse(caption)
    colours, background = _segment(picture)
    problems = _colour_problems(request, colours)
    found = []
    for thing, mask in zip(request.things, _masks(request, colours), strict=True):
        one = _find(mask)
        if one is None:
            problems.append(f"there is no {thing.colour} object")
            continue
        problems += _thing_problems(thing, one, paired=request.relation is not None)
        found.append(one)
    if len(found) == len(request.things):
        problems += _relation_problems(request, found)
    if request.background and (background.mean() > MIDDLE_GREY) != (request.background == "light"):
        problems.append(f"the background is not {request.background}")
    return Verdict(problems=tuple(problems))
