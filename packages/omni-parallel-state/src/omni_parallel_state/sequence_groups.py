"""Ulysses and Ring groups inside given sequence-parallel groups."""

from __future__ import annotations

from collections.abc import Sequence

from torch.distributed import ProcessGroup

from omni_group_coordinator import ParallelConfigError, ProcessGroupPool
from omni_parallel_state._layout_checks import world_error
from omni_parallel_state._legal_values import check_degree
from omni_parallel_state.rank_generator import generate_masked_orthogonal_rank_groups
from omni_parallel_state.state import default_backend, default_device


def sequence_subgroups(
    sp_group_ranks: Sequence[Sequence[int]],
    ulysses_degree: int,
    ring_degree: int,
    *,
    use_ulysses_low: bool = True,
) -> tuple[list[list[int]], list[list[int]]]:
    """Cut sequence-parallel groups into their Ulysses and their Ring groups.

    Args:
        sp_group_ranks: Ranks of each group in the order of the sequence, consecutive or not.
        ulysses_degree: Ranks of each Ulysses group.
        ring_degree: Ranks of each Ring group.
        use_ulysses_low: True: Ulysses peers are neighbours in the sequence, Ring peers are
            `ulysses_degree` apart. False: the other way round; a Ulysses group then holds no
            contiguous part of the sequence, which causal attention does not allow.

    Returns:
        The Ulysses groups and the Ring groups.

    Raises:
        ParallelConfigError: A group has another size than ulysses_degree * ring_degree.
    """
    check_degree("ulysses_degree", ulysses_degree)
    check_degree("ring_degree", ring_degree)
    size = ulysses_degree * ring_degree
    low, high = (ulysses_degree, ring_degree) if use_ulysses_low else (ring_degree, ulysses_degree)
    neighbours: list[list[int]] = []
    strided: list[list[int]] = []
    for ranks in sp_group_ranks:
        if len(ranks) != size:
            degrees = {"ulysses": ulysses_degree, "ring": ring_degree}
            raise world_error(len(ranks), degrees, exact=True)
        for mask, found in (([True, False], neighbours), ([False, True], strided)):
            positions = generate_masked_orthogonal_rank_groups(size, [low, high], mask)
            found += [[ranks[position] for position in group] for group in positions]
    return (neighbours, strided) if use_ulysses_low else (strided, neighbours)


def set_seq_parallel_pg(
    sp_ulysses_degree: int,
    sp_ring_degree: int,
    rank: int,
    world_size: int,
    use_ulysses_low: bool = True,
    sp_group_ranks: list[list[int]] | None = None,
) -> tuple[ProcessGroup | None, ProcessGroup | None]:
    """Make the Ulysses and Ring groups inside sequence-parallel groups. Call it on every rank.

    Args:
        sp_ulysses_degree: Ranks of each Ulysses group.
        sp_ring_degree: Ranks of each Ring group.
        rank: Global rank of this process.
        world_size: Number of ranks.
        use_ulysses_low: As in `sequence_subgroups`.
        sp_group_ranks: The sequence-parallel groups; default: runs of consecutive ranks, which is
            right only without tensor parallelism.

    Returns:
        This rank's Ulysses group and its Ring group; None for a group of one rank. The caller
        owns them; they end with torch's default group at the latest.

    Raises:
        ParallelConfigError: The degrees don't fit the groups or the world, or no group holds the
            rank.
    """
    size = check_degree("ulysses", sp_ulysses_degree) * check_degree("ring", sp_ring_degree)
    if sp_group_ranks is None:
        if world_size % size:
            degrees = {"ulysses": sp_ulysses_degree, "ring": sp_ring_degree}
            raise world_error(world_size, degrees, exact=False)
        sp_group_ranks = [list(range(start, start + size)) for start in range(0, world_size, size)]
    if not any(rank in ranks for ranks in sp_group_ranks):
        msg = f"rank {rank} is in none of sp_group_ranks={sp_group_ranks}; add its group"
        raise ParallelConfigError(msg)
    ulysses, ring = sequence_subgroups(
        sp_group_ranks, sp_ulysses_degree, sp_ring_degree, use_ulysses_low=use_ulysses_low
    )
    if size == 1:
        return None, None
    backend = default_backend()
    pool = ProcessGroupPool(backend, device=default_device(backend))
    made = [
        pool.groups_for(lists, name=name) for name, lists in (("ulysses", ulysses), ("ring", ring))
    ]
    first, second = (None if groups is None else groups.device for groups in made)
    return first, second
