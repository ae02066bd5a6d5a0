"""Draws the pictures that the model is trained on.

Shape letters: N pictures, H height, W width. Lengths are in units of the picture's shorter side.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from demo_model.grammar import COLOURS, Request, Thing

RADII: Final[dict[bool, dict[str | None, tuple[float, float]]]] = {
    # Alone in the picture, an object has room; of two, each must keep clear of the other.
    False: {"small": (0.13, 0.15), "large": (0.30, 0.33), None: (0.21, 0.24)},
    True: {"small": (0.10, 0.11), "large": (0.19, 0.20), None: (0.15, 0.165)},
}
"""Range of radii by "is one of two" and by size word."""

JITTER: Final = 0.02
"""How far, at most, the centre of an object lies from where the caption puts it."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One object with its place, size and colour settled."""

    shape: str
    x: float
    """Centre, as a share of the picture's width."""
    y: float
    """Centre, as a share of the picture's height, downwards."""
    radius: float
    colour: tuple[float, float, float]
    """Red, green and blue from 0 to 255."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture to draw."""

    things: tuple[Drawn, ...]
    background: tuple[float, float, float]
    """Red, green and blue from 0 to 255."""


def _circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.hypot(x, y) - r


def _square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.86 * r


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    inner = 0.58 * r
    y = y - 0.15 * r  # the bounding box, not the centroid, is centred on the object's place
    return torch.maximum(y, x.abs() * (math.sqrt(3) / 2) - y / 2) - inner


def _star(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    step = 2 * math.pi / 5
    tip, valley = 1.12, 0.46
    angle = torch.atan2(x, -y)
    folded = (torch.remainder(angle + step / 2, step) - step / 2).abs()
    length = torch.hypot(x, y)
    end_x, end_y = valley * math.cos(step / 2), valley * math.sin(step / 2)
    edge = math.hypot(tip - end_x, end_y)
    normal_x, normal_y = end_y / edge, (tip - end_x) / edge
    return (length * folded.cos() - tip * r) * normal_x + length * folded.sin() * normal_y


def _cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    upright = torch.maximum(x - 0.3 * r, y - r)
    return torch.minimum(upright, torch.maximum(x - r, y - 0.3 * r))


def _ring(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.76 * r).abs() - 0.24 * r


_DISTANCES: Final[dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}


def coverage(things: list[Drawn], height: int, width: int) -> Tensor:
    """Return how much of each pixel each object covers, as N H W from 0 to 1.

    The signed distance to the outline gives the covered share directly, which is antialiasing
    without drawing a larger picture first.
    """
    unit = min(height, width)
    rows = ((torch.arange(height) + 0.5) / unit)[:, None]
    columns = ((torch.arange(width) + 0.5) / unit)[None, :]
    covered = torch.empty(len(things), height, width)
    for shape, distance in _DISTANCES.items():
        chosen = [i for i, thing in enumerate(things) if thing.shape == shape]
        if not chosen:
            continue
        x = torch.tensor([things[i].x * width / unit for i in chosen])[:, None, None]
        y = torch.tensor([things[i].y * height / unit for i in chosen])[:, None, None]
        radius = torch.tensor([things[i].radius for i in chosen])[:, None, None]
        outside = distance(columns - x, rows - y, radius)
        covered[chosen] = (0.5 - outside * unit).clamp(0, 1)
    return covered


def render(scenes: list[Scene], height: int = 128, width: int = 128) -> Tensor:
    """Draw scenes as N 3 H W with values from -1 to 1."""
    picture = torch.tensor([scene.background for scene in scenes])[:, :, None, None]
    picture = picture.repeat(1, 1, height, width)
    for layer in range(2):
        owners = [i for i, scene in enumerate(scenes) if layer < len(scene.things)]
        things = [scenes[i].things[layer] for i in owners]
        if not things:
            continue
        colour = torch.tensor([thing.colour for thing in things])[:, :, None, None]
        share = coverage(things, height, width)[:, None]
        picture[owners] = torch.lerp(picture[owners], colour.expand(-1, -1, height, width), share)
    return picture / 127.5 - 1


PLACES: Final[dict[str | None, tuple[tuple[float, float], ...]]] = {
    None: ((0.5, 0.5),),
    "left": ((0.27, 0.5), (0.73, 0.5)),
    "right": ((0.73, 0.5), (0.27, 0.5)),
    "above": ((0.5, 0.27), (0.5, 0.73)),
    "below": ((0.5, 0.73), (0.5, 0.27)),
}
"""Centres of the objects by relation: what is left open would have to be learned as chance."""


def _place(request: Request, rng: random.Random) -> list[tuple[float, float]]:
    return [
        (x + rng.uniform(-JITTER, JITTER), y + rng.uniform(-JITTER, JITTER))
        for x, y in PLACES[request.relation]
    ]


def _background(request: Request, rng: random.Random) -> tuple[float, float, float]:
    level = rng.uniform(28, 36) if request.background == "dark" else rng.uniform(234, 242)
    return level, level, level


def _draw(thing: Thing, place: tuple[float, float], paired: bool, rng: random.Random) -> Drawn:
    red, green, blue = (c + rng.uniform(-3, 3) for c in COLOURS[thing.colour])
    return Drawn(
        shape=thing.shape,
        x=place[0],
        y=place[1],
        radius=rng.uniform(*RADII[paired][thing.size]),
        colour=(red, green, blue),
    )


def compose(request: Request, rng: random.Random) -> Scene:
    """Settle everything that a request leaves open."""
    paired = request.relation is not None
    places = _place(request, rng)
    return Scene(
        things=tuple(
            _draw(thing, place, paired, rng)
            for thing, place in zip(request.things, places, strict=True)
        ),
        background=_background(request, rng),
    )
