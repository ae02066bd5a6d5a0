"""The caption grammar: what the demonstration model can be asked for.

A caption names one or two objects, as in ``a small red circle left of a blue square on a dark
background``. Size, relation and background are optional; one object has no relation.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from typing import Final

COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (40, 80, 220),
    "yellow": (242, 212, 40),
    "purple": (150, 60, 190),
    "orange": (245, 135, 30),
    "cyan": (50, 200, 215),
}
SHAPES: Final = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES: Final = ("small", "large")
RELATIONS: Final[dict[str, tuple[str, ...]]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}
BACKGROUNDS: Final[dict[str, tuple[str, ...]]] = {
    "light": ("on a white background", "on a light background"),
    "dark": ("on a dark background", "on a black background"),
}
SIZE_SHARE: Final = 0.3
"""Share of the objects whose size is said."""
BACKGROUND_SHARE: Final = 0.35
"""Share of the captions that say the background."""
HELD_OUT_PERCENT: Final = 10
"""Share of the two-object requests that training never sees."""


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object of a caption."""

    colour: str
    """A key of `COLOURS`."""
    shape: str
    """One of `SHAPES`."""
    size: str | None = None
    """One of `SIZES`; None leaves the size open."""

    def text(self) -> str:
        """Return the words for this object, article included."""
        words = [word for word in (self.size, self.colour, self.shape) if word]
        article = "an" if words[0][0] in "aeiou" else "a"
        return " ".join([article, *words])


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a caption asks for, independent of how it is worded."""

    things: tuple[Thing, ...]
    """One or two objects; with two, the first stands in `relation` to the second."""
    relation: str | None = None
    """A key of `RELATIONS`; None exactly when there is one object."""
    background: str | None = None
    """A key of `BACKGROUNDS`; None leaves it open."""

    def text(self, rng: random.Random | None = None) -> str:
        """Word the request; `rng` picks among synonyms, None takes the first of each."""

        def pick(wordings: tuple[str, ...]) -> str:
            return rng.choice(wordings) if rng else wordings[0]

        words = [self.things[0].text()]
        if self.relation:
            words += [pick(RELATIONS[self.relation]), self.things[1].text()]
        if self.background:
            words.append(pick(BACKGROUNDS[self.background]))
        return " ".join(words)

    def held_out(self) -> bool:
        """Tell whether training leaves this request out.

        Decided by the colours, shapes and relation alone, so that no other size or background of a
        held-out combination leaks into training.
        """
        if self.relation is None:
            return False
        core = " ".join([self.relation, *(f"{t.colour} {t.shape}" for t in self.things)])
        return hashlib.sha256(core.encode()).digest()[0] < 256 * HELD_OUT_PERCENT // 100


_THING = rf"an?(?: ({'|'.join(SIZES)}))? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_RELATION = "|".join(wording for wordings in RELATIONS.values() for wording in wordings)
_BACKGROUND = "|".join(wording for wordings in BACKGROUNDS.values() for wording in wordings)
_CAPTION = re.compile(rf"{_THING}(?: ({_RELATION}) {_THING})?(?: ({_BACKGROUND}))?")


def _meaning(table: dict[str, tuple[str, ...]], wording: str | None) -> str | None:
    return next((key for key, wordings in table.items() if wording in wordings), None)


def parse(caption: str) -> Request:
    """Read a caption of the grammar.

    Raises:
        ValueError: `caption` is not a sentence of the grammar.
    """
    match = _CAPTION.fullmatch(" ".join(caption.lower().split()).rstrip("."))
    if match is None:
        msg = (
            "Expected a caption such as 'a red circle left of a blue square on a dark background', "
            f"got {caption!r}. Colours: {', '.join(COLOURS)}. Shapes: {', '.join(SHAPES)}."
        )
        raise ValueError(msg)
    size, colour, shape, relation, size_2, colour_2, shape_2, background = match.groups()
    things = [Thing(size=size, colour=colour, shape=shape)]
    if relation:
        things.append(Thing(size=size_2, colour=colour_2, shape=shape_2))
    return Request(
        things=tuple(things),
        relation=_meaning(RELATIONS, relation),
        background=_meaning(BACKGROUNDS, background),
    )


def _random_thing(rng: random.Random) -> Thing:
    return Thing(
        colour=rng.choice(list(COLOURS)),
        shape=rng.choice(SHAPES),
        size=rng.choice(SIZES) if rng.random() < SIZE_SHARE else None,
    )


def random_request(rng: random.Random, *, pairs: float = 0.7) -> Request:
    """Draw a request, held-out ones included; a share of `pairs` has two objects."""
    pair = rng.random() < pairs
    things = tuple(_random_thing(rng) for _ in range(2 if pair else 1))
    return Request(
        things=things,
        relation=rng.choice(list(RELATIONS)) if pair else None,
        background=rng.choice(list(BACKGROUNDS)) if rng.random() < BACKGROUND_SHARE else None,
    )


def vocabulary() -> list[str]:
    """Return every word of the grammar, sorted."""
    phrases = [*COLOURS, *SHAPES, *SIZES, "a", "an"]
    for table in (RELATIONS, BACKGROUNDS):
        phrases += [wording for wordings in table.values() for wording in wordings]
    return sorted({word for phrase in phrases for word in phrase.split()})
