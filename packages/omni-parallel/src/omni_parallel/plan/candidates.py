"""Layouts worth a prediction: those that are legal and leave no rank without a part."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from omni_parallel.plan.call_inputs import DenoiserClass
from omni_parallel.v1 import ModelFacts, ParallelConfig, find_problems
from omni_parallel.v1.legal_layouts import divisors


def candidates(
    ranks: int,
    facts: ModelFacts,
    kind: DenoiserClass,
    branches: int,
    size: tuple[int, int, int],
) -> list[ParallelConfig]:
    """Legal layouts of all ranks for one request.

    Weights are either whole or shared by as many ranks as can; all ranks share the autoencoder.
    Replicas, which work for other requests, are as few as can be.

    Args:
        ranks: How many there are.
        facts: What the model's configuration says.
        kind: What is known of the denoiser's class.
        branches: Predictions of a step.
        size: Width and height in pixels, and frames.
    """
    vae = ranks if facts.has_vae else 1
    found: list[ParallelConfig] = []
    fewest = ranks
    for degrees in _degrees(ranks, facts, kind, branches):
        used = _product(degrees)
        if used * fewest < ranks:
            continue
        base = ParallelConfig(**degrees, vae_patch=vae)
        legal = [
            config
            for config in (base, _sharded(base, ranks, facts, size))
            if config is not None and not find_problems(config, ranks, facts, size)
        ]
        if legal and ranks // used < fewest:
            fewest, found = ranks // used, []
        found += legal
    return found


def _degrees(
    ranks: int, facts: ModelFacts, kind: DenoiserClass, branches: int
) -> Iterator[dict[str, Any]]:
    tokens = divisors(ranks) if facts.is_transformer else [1]
    stages = tokens if kind.blocks and kind.stages else [1]
    cuts = [("pp", degree) for degree in stages]
    cuts += [("pipefusion", degree) for degree in stages if kind.patches and degree > 1]
    of_guidance = [n for n in divisors(ranks) if n <= branches]
    for cfg, (cut, degree), ulysses, ring in product(of_guidance, cuts, tokens, tokens):
        degrees: dict[str, Any] = {"cfg": cfg, "ulysses": ulysses, "ring": ring, cut: degree}
        # PipeFusion takes the two names for one thing.
        if ranks % _product(degrees) == 0 and not (cut == "pipefusion" and ring > 1):
            yield degrees


def _product(degrees: dict[str, Any]) -> int:
    total = 1
    for degree in degrees.values():
        total *= degree
    return total


def _sharded(
    base: ParallelConfig, ranks: int, facts: ModelFacts, size: tuple[int, int, int]
) -> ParallelConfig | None:
    """The layout with its weights shared by as many ranks as can."""
    for shared in reversed(divisors(ranks)[1:]):
        config = ParallelConfig(**{**base.to_dict(), "hsdp": shared})
        if not find_problems(config, ranks, facts, size):
            return config
    return None
