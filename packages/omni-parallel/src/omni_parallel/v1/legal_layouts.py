"""Layouts that are legal for so many ranks: the nearest to one that is not, and a good default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from math import isqrt, log2
from typing import Any

from omni_parallel.v1.model_facts import ModelFacts
from omni_parallel.v1.parallel_config import OVERLAYS, ParallelConfig

_SHOWN = 3
_MOST = 20_000  # tries: a world of hundreds of ranks with all degrees asked for
_LARGEST = 1_000_000  # ranks of a world that somebody means


def divisors(number: int) -> list[int]:
    """All positive divisors in ascending order."""
    low = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def nearest_legal(
    config: ParallelConfig, world_size: int, is_legal: Callable[[ParallelConfig], bool]
) -> list[ParallelConfig]:
    """The legal layouts that change the least, by the sum of the ratios of their degrees.

    Args:
        config: What was asked for.
        world_size: Ranks that there are.
        is_legal: Whether a layout can be.
    """
    if world_size > _LARGEST:
        return []
    asked = {
        name: degree
        for name, degree in config.to_dict().items()
        if name not in ("dp", "vae_mode", "options") and degree > 1
    }
    found: list[tuple[float, str, ParallelConfig]] = []
    for count, degrees in enumerate(_products(asked, world_size)):
        if count >= _MOST:
            break
        changed: dict[str, Any] = {"dp": None, "options": {}, **degrees}
        other = replace(config, **changed)
        far = sum(abs(log2(degrees[name] / asked[name])) for name in asked)
        found.append((far, str(other), other))
    legal: list[ParallelConfig] = []
    for _, _, other in sorted(found, key=lambda one: one[:2]):
        if is_legal(other):
            legal.append(other)
            if len(legal) == _SHOWN:
                break
    return legal


def _products(asked: dict[str, int], world_size: int) -> Iterator[dict[str, int]]:
    for degrees in product(*(divisors(world_size) for _ in asked)):
        found = dict(zip(asked, degrees, strict=True))
        ranks = 1
        for name, degree in found.items():
            ranks *= 1 if name in OVERLAYS else degree
        if world_size % ranks == 0:
            yield found


def auto_config(world_size: int, facts: ModelFacts) -> ParallelConfig:
    """A legal layout by a simple rule.

    Guidance first: two ranks share the branches, where the model has two and the number of ranks
    is even, for they exchange one prediction in a step. Then Ulysses, over as many of the rest as
    the model has heads and as divide it; Ring over what is left. All ranks share the autoencoder.

    Args:
        world_size: Ranks that there are.
        facts: What the model's configuration says.
    """
    cfg = 2 if world_size % 2 == 0 and facts.branches == 2 else 1
    rest = world_size // cfg
    ulysses = ring = 1
    if facts.is_transformer:
        ulysses = max(n for n in divisors(rest) if n <= (facts.heads or rest))
        ring = rest // ulysses
    return ParallelConfig(
        cfg=cfg, ulysses=ulysses, ring=ring, vae_patch=world_size if facts.has_vae else 1
    )
