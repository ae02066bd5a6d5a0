"""What can be known of a call before anything is sent: dimensions, lengths, dtypes.

A group of one rank makes the same checks as a larger one, so that code which was written on one
process does not fail on two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from omni_group_coordinator.checked_group import CheckedGroup, Place
from omni_group_coordinator.errors import ParallelConfigError
from omni_group_coordinator.payload import check_strided

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Alone(NamedTuple):
    """The only rank of a group."""

    name: str
    size: int = 1
    rank: int = 0


def agree_on_refusals(
    function: Callable[Concatenate[CheckedGroup, _P], _R],
) -> Callable[Concatenate[CheckedGroup, _P], _R]:
    """In debug mode, let the other ranks know when this one refuses its arguments.

    They have begun to compare the call already, and would wait for this rank.
    """

    @wraps(function)
    def run(group: CheckedGroup, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not group.debug or torch.compiler.is_compiling():
            return function(group, *args, **kwargs)
        try:
            return function(group, *args, **kwargs)
        except ParallelConfigError as error:
            group.agree_to_refuse(function.__name__, error)
            raise

    return run


def checked_pieces(
    place: Place, tensor: Tensor, dim: int, lengths: Sequence[int] | None
) -> tuple[int, list[int]]:
    """The dimension counted from 0, and the length of each rank's piece along it.

    Raises:
        ParallelConfigError: A sparse tensor; ``dim`` or ``lengths`` do not fit it.
    """
    check_strided(tensor)
    dim = checked_dim(dim, tensor)
    return dim, checked_lengths(place, tensor, dim, lengths)


def checked_split(
    place: Place, tensor: Tensor, dim: int, lengths: Sequence[int] | None
) -> tuple[int, list[int]]:
    """As `checked_pieces`, for a tensor that is whole and will be split.

    Raises:
        ParallelConfigError: A sparse tensor; ``dim`` or ``lengths`` do not fit it.
    """
    check_strided(tensor)
    dim = checked_dim(dim, tensor)
    return dim, split_lengths(place, tensor, dim, lengths)


def checked_exchange(
    place: Place,
    tensor: Tensor,
    dims: tuple[int, int],
    scatter_lengths: Sequence[int] | None,
    gather_lengths: Sequence[int] | None,
) -> tuple[int, int, list[int], list[int]]:
    """Dimensions and lengths of an all-to-all that splits ``dims[0]`` and joins ``dims[1]``.

    Raises:
        ParallelConfigError: The dimensions are the same, or lengths do not fit the tensor.
    """
    scatter_dim, scattered = checked_split(place, tensor, dims[0], scatter_lengths)
    gather_dim = checked_dim(dims[1], tensor)
    if scatter_dim == gather_dim:
        msg = f"all_to_all splits and joins dimension {scatter_dim}; they must be two dimensions"
        raise ParallelConfigError(msg)
    gathered = checked_lengths(place, tensor, gather_dim, gather_lengths)
    return scatter_dim, gather_dim, scattered, gathered


def checked_dim(dim: int, tensor: Tensor) -> int:
    """The dimension counted from 0.

    Raises:
        ParallelConfigError: The tensor has no such dimension.
    """
    if tensor.ndim == 0:
        msg = f"dim={dim} of a tensor without dimensions; pass tensor.reshape(1), and dim=0"
        raise ParallelConfigError(msg)
    if not -tensor.ndim <= dim < tensor.ndim:
        msg = (
            f"dim={dim} does not exist in a tensor of shape {tuple(tensor.shape)}; "
            f"legal here: {-tensor.ndim} to {tensor.ndim - 1}"
        )
        raise ParallelConfigError(msg)
    return dim % tensor.ndim


def checked_lengths(
    place: Place, tensor: Tensor, dim: int, lengths: Sequence[int] | None
) -> list[int]:
    """The length of each rank's piece along ``dim``, this rank's being that of the tensor.

    Raises:
        ParallelConfigError: Not one length for each rank, a negative one, or another for this
            rank than the tensor has.
    """
    own = tensor.shape[dim]
    if lengths is None:
        return [own] * place.size
    check_count(place, lengths)
    if lengths[place.rank] != own:
        msg = (
            f"group rank {place.rank} of group {place.name!r} holds a tensor of shape "
            f"{tuple(tensor.shape)}, of length {own} along dimension {dim}, where lengths="
            f"{list(lengths)} say {lengths[place.rank]}"
        )
        raise ParallelConfigError(msg)
    return list(lengths)


def split_lengths(
    place: Place, tensor: Tensor, dim: int, lengths: Sequence[int] | None
) -> list[int]:
    """The length of each rank's piece of ``tensor`` along ``dim``, which they add up to.

    Raises:
        ParallelConfigError: The lengths do not add up, or the length does not divide and no
            lengths were given.
    """
    whole = tensor.shape[dim]
    if lengths is None:
        if whole % place.size:
            low = whole - whole % place.size
            msg = (
                f"dimension {dim} of shape {tuple(tensor.shape)} cannot be split evenly over the "
                f"{place.size} ranks of group {place.name!r}; nearest lengths that can: {low} and "
                f"{low + place.size}; or pass the length of each rank's piece"
            )
            raise ParallelConfigError(msg)
        return [whole // place.size] * place.size
    check_count(place, lengths)
    if sum(lengths) != whole:
        msg = (
            f"lengths={list(lengths)} add up to {sum(lengths)}, but dimension {dim} of shape "
            f"{tuple(tensor.shape)} is {whole} long"
        )
        raise ParallelConfigError(msg)
    return list(lengths)


def check_count(place: Place, lengths: Sequence[int]) -> None:
    """Check that there is one length for each rank.

    Raises:
        ParallelConfigError: Another number of lengths, or a negative one.
    """
    if len(lengths) != place.size or any(length < 0 for length in lengths):
        msg = (
            f"lengths={list(lengths)} for group {place.name!r}: it needs {place.size} lengths, "
            "one for each rank, none negative"
        )
        raise ParallelConfigError(msg)


def any_length(tensor: Tensor, dim: int) -> list[object]:
    """The shape for messages of the debug mode, with a star where ranks may differ."""
    return ["*" if i == dim else size for i, size in enumerate(tensor.shape)]
