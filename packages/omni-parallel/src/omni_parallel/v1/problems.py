"""Everything that is wrong with a configuration, found before a weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from omni_group_coordinator import ParallelConfigError
from omni_parallel.v1.installed_packages import unknown_api
from omni_parallel.v1.legal_layouts import nearest_legal
from omni_parallel.v1.model_facts import ModelFacts
from omni_parallel.v1.parallel_config import STRATEGIES, ParallelConfig
from omni_parallel.v1.strategies import available_strategies, missing_text

Size = tuple[int, int, int]
"""Width and height in pixels, and frames."""

MOST_BRANCHES = 3
"""Of guidance, in any pipeline of diffusers: with text, without, and without an image."""

NOT_TOGETHER: dict[tuple[str, str], str] = {
    ("pp", "pipefusion"): "both cut the model's blocks into stages",
}
"""Strategies that one configuration cannot have together, and why."""


def find_problems(
    config: ParallelConfig,
    world_size: int,
    facts: ModelFacts | None = None,
    size: Size | None = None,
) -> list[str]:
    """All that keeps so many ranks from this configuration, one text each.

    Args:
        config: What ranks are to share.
        world_size: Ranks that there are.
        facts: What the model's configuration says; None: nothing is known of it.
        size: Pixels and frames that are asked for; None: any.
    """
    found = [*_of_world(config, world_size), *of_pairs(config), *_of_packages(config)]
    if facts is not None:
        found += [*_of_model(config, facts), *_of_size(config, facts, size)]
    return found


def validate(
    config: ParallelConfig,
    world_size: int,
    facts: ModelFacts | None = None,
    size: Size | None = None,
) -> None:
    """Refuse a configuration that cannot work, before any weight is loaded.

    Raises:
        ParallelConfigError: Lists every problem, and the nearest layouts that are legal.
    """
    problems = find_problems(config, world_size, facts, size)
    if not problems:
        return
    nearest = nearest_legal(
        config, world_size, lambda other: not find_problems(other, world_size, facts, size)
    )
    lines = [f"{config} cannot run on {world_size} rank{'' if world_size == 1 else 's'}:"]
    lines += [f"  - {problem}" for problem in problems]
    if nearest:
        lines.append(f"nearest legal: {' or '.join(map(str, nearest))}")
    raise ParallelConfigError("\n".join(lines))


def _of_world(config: ParallelConfig, world_size: int) -> Iterator[str]:
    try:
        config.layout(world_size)
    except ParallelConfigError as error:
        yield str(error)


def of_pairs(config: ParallelConfig) -> Iterator[str]:
    """Strategies that a configuration has and that do not go together, one text for each pair."""
    named = config.asked()
    for (first, second), why in NOT_TOGETHER.items():
        if first in named and second in named:
            yield f"{_asked(config, first)} and {_asked(config, second)}: {why}; legal: either"


def _of_packages(config: ParallelConfig) -> Iterator[str]:
    here = available_strategies()
    for name in set(config.options) - set(config.strategies()):
        degrees = " or ".join(f"{degree}=2" for degree in STRATEGIES[name])
        if name in config.asked():
            yield f"options for {name!r}: pipefusion shares tokens in its own way; legal: none"
            continue
        yield f"options for {name!r}, which the degrees leave off; legal: none, or {degrees}"
    yield from (
        unknown_api(name) or missing_text(name) for name in config.strategies() if name not in here
    )


def _of_model(config: ParallelConfig, facts: ModelFacts) -> Iterator[str]:
    kind = facts.denoiser or facts.name
    if not facts.is_transformer:
        for name in ("sp", "pp", "pipefusion"):
            if name in config.asked():
                yield (
                    f"{_asked(config, name)}: {kind} is no transformer, which alone has tokens and "
                    "blocks to share; legal: cfg, hsdp, vae_patch"
                )
    by_heads = "sp" in config.strategies()
    if by_heads and facts.heads is not None and config.ulysses > facts.heads:
        yield (
            f"ulysses={config.ulysses}: {kind} has {facts.heads} heads, so that further ranks "
            f"would have none; legal: 1 to {facts.heads}, and ring for the rest"
        )
    stages = max(config.pp, config.pipefusion)
    if facts.blocks is not None and stages > facts.blocks:
        name = "pp" if config.pp > 1 else "pipefusion"
        yield (
            f"{name}={stages}: {kind} has {facts.blocks} blocks, so that further stages would have "
            f"none; legal: 1 to {facts.blocks}"
        )
    if config.cfg > MOST_BRANCHES:
        yield (
            f"cfg={config.cfg}: no pipeline has more than {MOST_BRANCHES} guidance branches, so "
            f"that further ranks would have none; legal: 1 to {MOST_BRANCHES}"
        )
    if config.vae_patch > 1 and not facts.has_vae:
        yield f"vae_patch={config.vae_patch}: {facts.name} has no autoencoder; legal: 1"


def _of_size(config: ParallelConfig, facts: ModelFacts, size: Size | None) -> Iterator[str]:
    tokens = None if size is None else facts.tokens(*size)
    ranks = config.ulysses * config.ring
    patches = config.options.get("pipefusion", {}).get("patches", 1)
    shares = ranks * patches if config.pipefusion > 1 and isinstance(patches, int) else ranks
    if size is None or tokens is None or shares <= tokens:
        return
    width, height, frames = size
    video = f" and {frames} frames" if frames > 1 else ""
    pixels = f"{width} x {height} pixels{video} are {tokens} tokens"
    if ranks > tokens:
        yield (
            f"{_asked(config, 'sp')}: {pixels}, so that further ranks would have none; legal: up "
            f"to {tokens} ranks"
        )
    else:
        each = f" for {ranks} ranks each" if ranks > 1 else ""
        yield (
            f"options for 'pipefusion', patches={patches}: {pixels}, which cannot be cut into so "
            f"many{each}; legal: 1 to {tokens // ranks}"
        )


def _asked(config: ParallelConfig, strategy: str) -> str:
    degrees = [name for name in STRATEGIES[strategy] if getattr(config, name) > 1]
    return ",".join(f"{name}={getattr(config, name)}" for name in degrees)
