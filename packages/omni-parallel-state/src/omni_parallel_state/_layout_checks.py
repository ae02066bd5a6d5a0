"""What a layout refuses, and what it proposes instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import gcd, prod

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state._legal_values import divisors, listing, nearest, product_text, ranks_text
from omni_parallel_state._nearest_degrees import covered, may_change, nearest_combinations


def check_hsdp(world_size: int, fs: int, replicate: int, weight_strides: Mapping[str, int]) -> None:
    """Refuse an HSDP mesh that does not tile the world or that mixes different weights.

    Args:
        world_size: Ranks of the layout.
        fs: Ranks that share one copy of the weights.
        replicate: Copies in one HSDP mesh.
        weight_strides: For each dimension of several ranks whose peers hold different weights:
            how far apart these peers are. A run of n neighbours that starts at a multiple of n
            stays within one index of such a dimension exactly if n divides its stride.

    Raises:
        ParallelConfigError: Names the nearest values that work.
    """
    # A block must divide the world and each stride, which is to divide what all have in common.
    legal = gcd(world_size, *weight_strides.values())
    block = {"fs": fs, "replicate": replicate}
    if legal % covered(block) == 0:
        return
    why = f"does not divide the world of {ranks_text(world_size)}"
    if world_size % covered(block) == 0:
        peers = " and ".join(weight_strides)
        why = f"would shard weights over peers of {peers}, whose weights differ"
    options = {
        f"fs with replicate={replicate}": _alternatives(legal, block, "fs"),
        f"replicate with fs={fs}": _alternatives(legal, block, "replicate"),
    }
    proposed = _options_text(options) or _combinations_text(legal, block)
    msg = f"{product_text(block)} {why}; nearest legal {proposed}"
    raise ParallelConfigError(msg)


def check_vae(world_size: int, vae: int) -> None:
    """Refuse VAE groups that don't tile the world.

    Raises:
        ParallelConfigError: `vae` does not divide the world; names the nearest values that do.
    """
    if world_size % vae:
        legal = listing(nearest(divisors(world_size), vae))
        msg = f"vae={vae} does not divide the {ranks_text(world_size)}; nearest legal vae: {legal}"
        raise ParallelConfigError(msg)


def world_error(world_size: int, degrees: Mapping[str, int], *, exact: bool) -> ParallelConfigError:
    """The error for degrees that don't fit a world, with the nearest that do.

    Args:
        world_size: Ranks there are.
        degrees: The degrees that were asked for.
        exact: The degrees must multiply to the world; else to a divisor of it.
    """
    ranks = covered(degrees)
    options = {
        name: _alternatives(world_size, degrees, name, exact=exact)
        for name, degree in degrees.items()
        if may_change(name, degree)
    }
    proposed = _options_text(options) or _combinations_text(world_size, degrees, exact=exact)
    below = world_size // ranks * ranks
    worlds = [ranks] if exact else [n for n in (below, below + ranks) if n]
    why = f"{product_text(degrees)} does not divide the world of {ranks_text(world_size)}"
    if exact:
        why = f"{_laid_out_text(degrees)}, but the world has {world_size}"
    sizes = f"{worlds[0]} or {ranks_text(worlds[1])}" if worlds[1:] else ranks_text(worlds[0])
    return ParallelConfigError(f"{why}; nearest legal: {proposed}; or a world of {sizes}")


def _alternatives(
    total: int, degrees: Mapping[str, int], name: str, *, exact: bool = False
) -> list[int]:
    """The nearest values of one degree that work with the others as they are."""
    found = ((degree, covered({**degrees, name: degree})) for degree in divisors(total))
    fit = (degree for degree, n in found if (n == total if exact else total % n == 0))
    return nearest(fit, degrees[name])


def _combinations_text(total: int, degrees: Mapping[str, int], *, exact: bool = False) -> str:
    combinations = nearest_combinations(total, degrees, exact=exact)
    asked = {name for name, degree in degrees.items() if may_change(name, degree)}
    return " or ".join(
        " * ".join(f"{name}={degree}" for name, degree in found.items() if name in asked)
        for found in combinations
    )


def _laid_out_text(degrees: Mapping[str, int]) -> str:
    """What degrees were asked for and how many ranks they make; vae is no factor of them."""
    others = {name: degree for name, degree in degrees.items() if name != "vae"}
    vae = degrees.get("vae", 1)
    if vae == 1 or prod(others.values()) == 1:
        return f"{product_text(degrees)} lays out {ranks_text(covered(degrees))}"
    return f"{product_text(others)} with vae={vae} lays out {ranks_text(covered(degrees))}"


def _options_text(options: Mapping[str, Iterable[int]]) -> str:
    return "; ".join(f"{name}: {listing(values)}" for name, values in options.items() if values)
