"""The options ``--layout`` and ``--ranks``: what the ranks of the parallel run share."""

from __future__ import annotations

from dataclasses import replace

from omni_group_coordinator import ParallelConfigError
from omni_parallel.comparable import not_refused
from omni_parallel.demo.limits import DEFAULT_RANKS, MAX_RANKS
from omni_parallel.demo.pipeline import MODEL
from omni_parallel.demo.request import DemoRequest
from omni_parallel.v1 import ModelFacts, ParallelConfig, auto_config, find_problems, validate
from omni_parallel.v1.legal_layouts import nearest_legal

GUIDANCE_BRANCHES = 2
"""One for the prompt and one for the negative prompt."""


def choose_config(ranks: int | None, layout: str | None) -> tuple[ParallelConfig, int]:
    """What the ranks share, and how many there are.

    Args:
        ranks: Of ``--ranks``; None: as many as the layout needs.
        layout: Of ``--layout``; None: the ranks share the tokens of a picture.

    Raises:
        ParallelConfigError: The layout is none.
    """
    if layout is None or layout == "auto":
        ranks = DEFAULT_RANKS if ranks is None else ranks
        config = auto_config(ranks, ModelFacts.from_folder(MODEL))
        return (replace(config, vae_patch=1) if layout is None else config), ranks
    if not layout.strip():
        msg = "an empty layout; legal: name=degree, such as cfg=2,ulysses=2, or auto"
        raise ParallelConfigError(msg)
    config = ParallelConfig.of(layout)
    return not_refused(config), config.ranks if ranks is None else ranks


def check_config(
    config: ParallelConfig, ranks: int, request: DemoRequest, facts: ModelFacts
) -> None:
    """Refuse a layout that cannot draw what is asked for, before a rank starts.

    Raises:
        ParallelConfigError: Lists every problem, and the nearest layouts that are legal.
    """
    size = (request.width, request.height, 1)
    if ranks > MAX_RANKS:
        nearest = nearest_legal(
            config, MAX_RANKS, lambda other: not find_problems(other, MAX_RANKS, facts, size)
        )
        msg = (
            f"{config} is {ranks} ranks; legal: up to {MAX_RANKS}; nearest: "
            f"{' or '.join(map(str, nearest))}"
        )
        raise ParallelConfigError(msg)
    validate(config, ranks, facts, size)
    if config.cfg > GUIDANCE_BRANCHES:
        msg = (
            f"cfg={config.cfg}: the demonstration's model has {GUIDANCE_BRANCHES} guidance "
            "branches, one for the prompt and one for the negative prompt, so that further ranks "
            f"would have none; legal: 1 to {GUIDANCE_BRANCHES}"
        )
        raise ParallelConfigError(msg)
