"""How much each way of parallel attention sends, and which is cheapest."""

from __future__ import annotations

from typing import NamedTuple


class Degrees(NamedTuple):
    """How the ranks of a sequence divide the work of attention."""

    ulysses: int
    """Ranks that exchange sequence shards for head shards."""
    ring: int
    """Ranks that pass on, or gather, keys and values."""


def attention_volume(degrees: Degrees, kv_ratio: float = 1.0) -> float:
    """What a rank sends per attention layer, in units of one whole-sequence query.

    Ulysses over U of P ranks sends ``(2 + 2 f) (U - 1) / (U P)``: query, key, value and result,
    of each the part that its peers compute. Ring and AllGather-KV over R ranks then send keys and
    values of ``1 / U`` of the heads: ``2 f (R - 1) / P``.

    Args:
        degrees: Ulysses and Ring ranks; their product is P.
        kv_ratio: f, key/value heads for each query head: 1 without grouped heads.
    """
    ranks = degrees.ulysses * degrees.ring
    exchanged = (2 + 2 * kv_ratio) * (degrees.ulysses - 1) / (degrees.ulysses * ranks)
    return exchanged + 2 * kv_ratio * (degrees.ring - 1) / ranks


def cheapest(world_size: int, given: Degrees, heads: int, kv_heads: int) -> Degrees:
    """The way that sends least, among those whose heads divide evenly; of two equal ones Ulysses.

    Args:
        world_size: Ranks of the sequence.
        given: The degrees of the layout, whose groups exist beside that of all ranks.
        heads: Query heads.
        kv_heads: Key/value heads.
    """
    ways = [Degrees(world_size, 1), given, Degrees(1, world_size)]
    even = [way for way in ways if heads % way.ulysses == 0]
    return min(even, key=lambda way: attention_volume(way, kv_heads / heads))
