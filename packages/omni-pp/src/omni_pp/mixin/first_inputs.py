"""The first inputs of a request, which the ranks of one image compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from omni_group_coordinator import GroupCoordinator, RankMismatchError
from omni_parallel_state.denoising.signature import fingerprint, same_inputs, signature


def agreed_inputs(
    stages: GroupCoordinator,
    columns: GroupCoordinator,
    branches: Sequence[dict[str, Any]],
    seeds: Literal["error", "broadcast"],
) -> list[dict[str, Any]]:
    """The inputs of the branches, the same on every rank of one image.

    Args:
        stages: The ranks of one column.
        columns: The ranks of one stage, in a column each.
        branches: Arguments of each branch.
        seeds: What to do where columns differ: an error, or the first one's tensors for all.

    Raises:
        RankMismatchError: On every rank: they differ, and that was to be an error.
    """
    shapes = repr([signature((), one) for one in branches])
    problem = _compared(stages, branches, shapes, "stage")
    if columns.world_size > 1:
        said = columns.all_gather_object([problem, shapes])
        problem = next((text for text, _ in said if text is not None), None)
        if problem is None and seeds == "broadcast" and all(one == shapes for _, one in said):
            branches = [_broadcast(columns, one) for one in branches]
        elif problem is None:
            problem = _compared(columns, branches, shapes, "column")
    if problem is not None:
        raise RankMismatchError(problem)
    return list(branches)


def _compared(
    group: GroupCoordinator, branches: Sequence[dict[str, Any]], shapes: str, what: str
) -> str | None:
    """What is wrong with the inputs that the ranks of a group have, if anything is."""
    values = [fingerprint((), branch) for branch in branches]
    first, *others = group.all_gather_object([shapes, values])
    for rank, (other, given) in enumerate(others, start=1):
        if other != first[0]:
            found = f"{other} and {first[0]}"
        elif not all(map(same_inputs, given, first[1])):
            found = "their shapes are equal, their values are not"
        else:
            continue
        return (
            f"{what} {rank} starts from other inputs than {what} 0: {found}; every rank runs the "
            "pipeline alike, with the same prompts and generators of the same seed"
        )
    return None


def _broadcast(group: GroupCoordinator, branch: dict[str, Any]) -> dict[str, Any]:
    names = sorted(name for name, value in branch.items() if isinstance(value, Tensor))
    return branch | {name: group.broadcast(branch[name].clone()) for name in names}
