"""Checking that what code of your own shards, it gathers again, along the same dimension."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from weakref import ref

from torch import Tensor

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state import ParallelState
from omni_sp.sp_sharding import sp_gather, sp_shard


@dataclass
class _Record:
    """One tensor that was sharded."""

    dim: int
    """Dimension, counted from 0."""
    shape: tuple[int, ...]
    """Of the whole."""
    local: tuple[int, ...]
    """Of this rank's shard."""
    whole_tensor: ref[Tensor]
    """The whole, by which it is known under another name too."""
    shard_tensor: ref[Tensor]
    """This rank's shard; the whole on one rank."""
    gathered: bool = False


@dataclass
class ShardingValidator:
    """Records what is sharded and gathered, by name, and says what does not fit.

    Within `track`, `shard` and `gather` are recorded in order, with dimension and shapes; a
    tensor that is sharded twice, gathered along another dimension, gathered twice or gathered
    without a shard is an error at once, and one that was never gathered is one in `validate`.
    Outside of it they only do their work::

        validator = ShardingValidator()
        with validator.track():
            hidden_states = validator.shard(hidden_states, "hidden_states", dim=1)
            ...
            output = validator.gather(output, "hidden_states", dim=1)
        validator.validate()

    Attributes:
        history: What was done, in order, in words.
    """

    state: ParallelState | None = None
    """The ranks; ``None``: the current state."""
    history: list[str] = field(default_factory=list, init=False)
    _records: dict[str, _Record] = field(default_factory=dict, init=False, repr=False)
    _enabled: bool = field(default=False, init=False, repr=False)
    _tracked: bool = field(default=False, init=False, repr=False)

    def reset(self) -> None:
        """Forget what was recorded."""
        self.history.clear()
        self._records.clear()
        self._tracked = False

    @contextmanager
    def track(self) -> Iterator[ShardingValidator]:
        """Record within the block; begins anew."""
        self.reset()
        self._enabled = self._tracked = True
        try:
            yield self
        finally:
            self._enabled = False

    def shard(self, tensor: Tensor, name: str, dim: int, validate_divisible: bool = True) -> Tensor:
        """`sp_shard`, recorded.

        Args:
            tensor: The whole tensor.
            name: Identifies it.
            dim: Dimension to split.
            validate_divisible: Raise if the length does not divide over the ranks.

        Raises:
            ParallelConfigError: The name is sharded already, or the tensor is by another name, or
                it is a shard itself; or as `sp_shard`.
        """
        record = self._records.get(name)
        if self._enabled and record is not None and not record.gathered:
            msg = (
                f"{name!r} is sharded already, along dimension {record.dim} of shape "
                f"{record.shape}; gather it first, or shard this one by another name"
            )
            raise ParallelConfigError(msg)
        if self._enabled:
            self._check_other_names(tensor, name, dim)
        local = sp_shard(tensor, dim, validate_divisible, state=self.state)
        if self._enabled:
            shapes = tuple(tensor.shape), tuple(local.shape)
            new = _Record(dim % tensor.ndim, *shapes, ref(tensor), ref(local))
            self._records[name] = new
            self.history.append(f"shard {name!r}: {new.shape} along {new.dim} to {new.local}")
        return local

    def _check_other_names(self, tensor: Tensor, name: str, dim: int) -> None:
        """By the identity of the tensor: views of the same memory may be other tokens."""
        for other, record in self._records.items():
            whole = record.whole_tensor() is tensor
            if record.gathered or not (whole or record.shard_tensor() is tensor):
                continue
            if whole and dim % tensor.ndim != record.dim:
                continue  # the whole, split in another way as well
            what = "is sharded already" if whole else "is this rank's shard already"
            msg = (
                f"the tensor of shape {tuple(tensor.shape)} that is to be sharded as {name!r} "
                f"{what}, by the name {other!r} along dimension {record.dim}; shard it once, and "
                "gather it by that name"
            )
            raise ParallelConfigError(msg)

    def gather(self, tensor: Tensor, name: str, dim: int) -> Tensor:
        """`sp_gather`, recorded; of uneven shards too if the shard was recorded.

        Args:
            tensor: This rank's shard.
            name: As it was given to `shard`.
            dim: Dimension that was split.

        Raises:
            ParallelConfigError: The name was not sharded, was gathered already, or was sharded
                along another dimension or into shards of another length.
        """
        record = self._checked(tensor, name, dim) if self._enabled else self._records.get(name)
        length = None if record is None else record.shape[record.dim]
        whole = sp_gather(tensor, dim, length=length, state=self.state)
        if self._enabled and record is not None:
            record.gathered = True
            self.history.append(f"gather {name!r}: along {record.dim} to {tuple(whole.shape)}")
        return whole

    def _checked(self, tensor: Tensor, name: str, dim: int) -> _Record:
        record = self._records.get(name)
        if record is None or record.gathered:
            what = "was never sharded" if record is None else "is gathered already"
            known = [key for key, value in self._records.items() if not value.gathered]
            msg = f"gather of {name!r}, which {what}; sharded now: {', '.join(known) or 'nothing'}"
            raise ParallelConfigError(msg)
        if dim % tensor.ndim != record.dim:
            msg = (
                f"{name!r} was sharded along dimension {record.dim} of shape {record.shape}, and "
                f"is gathered along {dim % tensor.ndim}; legal: dim={record.dim}"
            )
            raise ParallelConfigError(msg)
        expected = record.local[record.dim]
        if tensor.shape[record.dim] != expected:
            msg = (
                f"{name!r} has {expected} tokens on this rank, and is gathered with a tensor of "
                f"shape {tuple(tensor.shape)}"
            )
            raise ParallelConfigError(msg)
        return record

    def validate(self) -> None:
        """Check that everything sharded was gathered.

        Raises:
            ParallelConfigError: Something was not, or nothing was tracked at all.
        """
        if not self._tracked:
            msg = "nothing was recorded: shard and gather within `with validator.track():`"
            raise ParallelConfigError(msg)
        left = {name: record for name, record in self._records.items() if not record.gathered}
        if left:
            named = ", ".join(
                f"{name!r} ({record.shape} along dimension {record.dim})"
                for name, record in left.items()
            )
            msg = f"sharded and not gathered: {named}"
            raise ParallelConfigError(msg)


_current: ContextVar[ShardingValidator | None] = ContextVar("omni_sp_validator", default=None)


def get_sharding_validator() -> ShardingValidator:
    """The validator of this context: one for each thread and task, made at the first call."""
    validator = _current.get()
    if validator is None:
        validator = ShardingValidator()
        _current.set(validator)
    return validator
