"""What a layout refuses, and what it proposes instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state._legal_values import divisors, listing, nearest, product_text, ranks_text


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

    def legal(block: int) -> bool:
        fits = world_size % block == 0
        return fits and not any(stride % block for stride in weight_strides.values())

    if legal(fs * replicate):
        return
    why = f"does not divide the world of {ranks_text(world_size)}"
    if world_size % (fs * replicate) == 0:
        peers = " and ".join(weight_strides)
        why = f"would shard weights over peers of {peers}, whose weights differ"
    candidates = divisors(world_size)
    options = {
        f"fs with replicate={replicate}": nearest(
            (n for n in candidates if legal(n * replicate)), fs
        ),
        f"replicate with fs={fs}": nearest((n for n in candidates if legal(fs * n)), replicate),
    }
    asked = product_text({"fs": fs, "replicate": replicate})
    msg = f"{asked} {why}; nearest legal {_options_text(options)}"
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
    product = prod(degrees.values())
    options: dict[str, list[int]] = {}
    for name, degree in degrees.items():
        rest, remainder = divmod(world_size, product // degree)
        if remainder or not (degree > 1 or name == "dp"):
            continue
        options[name] = [rest] if exact else nearest(divisors(rest), degree)
    below = world_size // product * product
    worlds = [product] if exact else [n for n in (below, below + product) if n]
    asked = product_text(degrees)
    why = f"{asked} does not divide the world of {ranks_text(world_size)}"
    if exact:
        why = f"{asked} lays out {ranks_text(product)}, but the world has {world_size}"
    alternatives = f"{_options_text(options)}; or " if options else ""
    sizes = f"{worlds[0]} or {ranks_text(worlds[1])}" if worlds[1:] else ranks_text(worlds[0])
    return ParallelConfigError(f"{why}; nearest legal: {alternatives}a world of {sizes}")


def _options_text(options: Mapping[str, Iterable[int]]) -> str:
    return "; ".join(f"{name}: {listing(values)}" for name, values in options.items() if values)
