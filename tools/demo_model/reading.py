"""Teaches the text encoders to read captions before they steer pictures.

Order is what a caption says of places ("a left of b"), and learning it from noisy pictures alone
takes millions of them. So both encoders are first trained, on text, to answer what a caption
means: each word of an object which object it is and where it stands, the pooled output what is
where. Only the encoders are kept; the heads that answer are not.
"""

import random
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from demo_model.flow import Conditioned
from demo_model.grammar import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, Request
from demo_model.loop import learning_rate, optimiser_step, run_phase, seed_step
from demo_model.pool import SENTENCE_SHARE, Tokenizers, tokenize, trained_request
from demo_model.text import LENGTH, WIDTH

BATCH: Final = 64
RATE: Final = 3e-3
SLOTS: Final[dict[str | None, tuple[str, ...]]] = {
    None: ("centre",),
    "left": ("left", "right"),
    "right": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
"""Where the objects of a caption stand, by relation."""
PLACES: Final = ("centre", "left", "right", "top", "bottom")
QUESTIONS: Final[dict[str, tuple[str | None, ...]]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": (None, *SIZES),
}
NOTHING: Final = -100
"""Label of a word that belongs to no object, which cross entropy passes over."""


class Reader(nn.Module):
    """Heads that answer from the encoders' outputs."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {name: len(answers) for name, answers in QUESTIONS.items()}
        self.words = nn.ModuleDict(
            {name: nn.Linear(WIDTH, n) for name, n in {**sizes, "place": len(PLACES)}.items()}
        )
        # One answer more than there are: nothing stands there.
        self.pooled = nn.ModuleDict(
            {
                f"{place} {name}": nn.Linear(WIDTH, n + 1)
                for place in PLACES
                for name, n in sizes.items()
            }
        )
        self.pooled["background"] = nn.Linear(WIDTH, 2)


def worded(request: Request, rng: random.Random) -> tuple[str, list[int]]:
    """A caption of a request, and for each word the index of its object or -1."""
    groups = [(0, request.things[0].text())]
    if request.relation:
        groups += [(-1, rng.choice(RELATIONS[request.relation])), (1, request.things[1].text())]
    if request.background:
        groups.append((-1, rng.choice(BACKGROUNDS[request.background])))
    owners = [owner for owner, words in groups for _ in words.split()]
    text = " ".join(words for _, words in groups)
    text = text[0].upper() + text[1:] if rng.random() < SENTENCE_SHARE else text
    return text + "." if rng.random() < SENTENCE_SHARE else text, owners


def answers(request: Request, owners: list[int]) -> tuple[dict[str, list[int]], dict[str, int]]:
    """What the heads should say: for each word, and for the pooled output."""
    places = SLOTS[request.relation]
    objects = [
        {name: choices.index(getattr(thing, name)) for name, choices in QUESTIONS.items()}
        | {"place": PLACES.index(place)}
        for thing, place in zip(request.things, places, strict=True)
    ]
    padding = [NOTHING] * (LENGTH - len(owners))
    words = {
        name: [objects[i][name] if i >= 0 else NOTHING for i in owners] + padding
        for name in objects[0]
    }
    pooled = {"background": int(request.background == "dark")}
    for place in PLACES:
        there = objects[places.index(place)] if place in places else None
        for name, choices in QUESTIONS.items():
            pooled[f"{place} {name}"] = len(choices) if there is None else there[name]
    return words, pooled


def train(work: Path, steps: int, model: Conditioned, tokenizers: Tokenizers) -> None:
    """Train the text encoders of `model`, or finish training them."""
    reader = Reader()
    both = nn.ModuleList([model.clip, model.t5, reader])
    optimiser = torch.optim.AdamW(both.parameters(), lr=RATE, betas=(0.9, 0.98))

    def step(index: int) -> dict[str, float]:
        rng = random.Random(seed_step(index))
        requests = [trained_request(rng) for _ in range(BATCH)]
        captions, owners = zip(*(worded(request, rng) for request in requests), strict=True)
        pooled, tokens = model.conditions(*(tokenize(t, list(captions)) for t in tokenizers))
        labels = [answers(request, own) for request, own in zip(requests, owners, strict=True)]
        loss, right = _marks(reader, pooled, tokens, labels)
        rate = learning_rate(index, steps, peak=RATE, warm_up=50)
        optimiser_step(loss, both, optimiser, rate)
        return {"loss": loss.item(), "right": right}

    keep: dict[str, Any] = {"clip": model.clip, "t5": model.t5, "reader": reader}
    run_phase("reading", work, steps, {**keep, "optimiser": optimiser}, step)


def _marks(
    reader: Reader,
    pooled: Tensor,
    tokens: Tensor,
    labels: list[tuple[dict[str, list[int]], dict[str, int]]],
) -> tuple[Tensor, float]:
    """The loss of all answers, and the share of captions whose pooled answers are all right."""
    losses = []
    for name, head in reader.words.items():
        wanted = torch.tensor([words[name] for words, _ in labels])
        losses.append(nn.functional.cross_entropy(head(tokens).transpose(1, 2), wanted))
    right = torch.ones(len(labels), dtype=torch.bool)
    for name, head in reader.pooled.items():
        wanted = torch.tensor([answer[name] for _, answer in labels])
        said = head(pooled)
        losses.append(nn.functional.cross_entropy(said, wanted))
        right &= said.argmax(-1) == wanted
    return torch.stack(losses).mean(), right.float().mean().item()
