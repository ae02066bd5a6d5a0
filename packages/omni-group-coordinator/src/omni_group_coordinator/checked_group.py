"""One process group and everything that must hold before torch is asked to use it.

torch's backends trust their caller: on gloo a strided output, a wrong size or an unknown dtype
corrupts memory or ends the process. Every message of the project is therefore posted here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Protocol, TypeVar
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from omni_group_coordinator import agreement
from omni_group_coordinator.awake_wait import wait_awake
from omni_group_coordinator.errors import (
    CommunicationError,
    ParallelConfigError,
    ParallelError,
    reason_of,
)
from omni_group_coordinator.named_barrier import named_barrier
from omni_group_coordinator.payload import byte_count, transportable
from omni_group_coordinator.pending_work import PendingWork, wait_all
from omni_group_coordinator.process_groups import ProcessGroups, serves_cpu
from omni_group_coordinator.traffic import count

__all__ = ["CheckedGroup", "PendingWork", "Place", "check_peer", "default_group", "wait_all"]

T = TypeVar("T")

_keys = itertools.count()
_groups_by_key: WeakValueDictionary[str, CheckedGroup] = WeakValueDictionary()


class Place(Protocol):
    """What checks of arguments must know of a group, which may have one rank."""

    @property
    def name(self) -> str:
        """Word for the group in messages."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    @property
    def rank(self) -> int:
        """Group rank of this process."""


class CheckedGroup:
    """Posts the primitive operations of one group, with a useful error when one fails.

    Peers are group ranks. Tensors are contiguous: the callers see to it.

    Args:
        groups: The torch groups.
        name: Word for the group in messages, for example ``"sp"``.
        timeout: Timeout that the groups were made with, for messages; ``None``: not known.
        debug: Compare every call over the ranks first; default: the environment decides.
    """

    def __init__(
        self,
        groups: ProcessGroups,
        *,
        name: str,
        timeout: timedelta | None = None,
        debug: bool | None = None,
    ) -> None:
        self.group = groups.device
        self.cpu_group = groups.cpu
        self.ranks = groups.ranks
        self.size = len(groups.ranks)
        self.rank = groups.ranks.index(dist.get_rank())
        self.name = name
        self.timeout = timeout
        self.debug = agreement.debug_by_default() if debug is None else debug
        self.failed = False
        self._gloo_groups = [g for g in {self.group, self.cpu_group} if _backend(g) == "gloo"]
        self.key = f"{name}/{next(_keys)}"
        _groups_by_key[self.key] = self

    @staticmethod
    def by_key(key: str) -> CheckedGroup:
        """The group with this key: operators that torch.compile traced hold only the key.

        Raises:
            ParallelError: The group was destroyed after the trace.
        """
        try:
            return _groups_by_key[key]
        except KeyError:
            msg = f"group {key!r} no longer exists; compile the model again after a new init"
            raise ParallelError(msg) from None

    @classmethod
    def of(cls, group: ProcessGroup | None) -> CheckedGroup:
        """Wrap a plain torch group for one call (``None``: the default group).

        Raises:
            ParallelConfigError: Under torch.compile, which needs a group that outlives the trace.
        """
        if torch.compiler.is_compiling():
            msg = (
                "a plain process group cannot be used in a compiled function; make a coordinator "
                "of it outside: GroupCoordinator.from_process_group(group)"
            )
            raise ParallelConfigError(msg)
        group = default_group() if group is None else group
        groups = ProcessGroups(tuple(dist.get_process_group_ranks(group)), group, group)
        described = group.group_desc not in ("", "undefined")  # the latter is torch's default
        return cls(groups, name=group.group_desc if described else group.group_name)

    def run(self, operation: str, call: Callable[[], T]) -> T:
        """Run a call of torch.distributed and say, if it fails, what it was.

        Raises:
            CommunicationError: With group, ranks, operation and the timeout.
        """
        try:
            return call()
        except (ParallelError, torch.OutOfMemoryError):  # no peer is to blame for a full device
            raise
        except RuntimeError as error:
            self.failed = True
            raise self._failure(operation, error) from error

    def _failure(self, operation: str, error: RuntimeError) -> CommunicationError:
        hint = f" Set {agreement.DEBUG_VARIABLE}=1 to have mismatched calls named."
        after = f" (timeout {self.timeout.total_seconds():g} s)" if self.timeout else ""
        msg = (
            f"{operation} failed on rank {self.ranks[self.rank]} in group {self.name!r} of ranks "
            f"{', '.join(map(str, self.ranks))}{after}: {reason_of(error)}\n"
            "A rank of the group died, hangs, or called something else. The group is unusable "
            "now: destroy the parallel state and build a new one."
        ) + ("" if self.debug else hint)
        return CommunicationError(msg, group=self.name, ranks=self.ranks, operation=operation)

    def peer(self, rank: int, role: str) -> int:
        """Check a group rank that a message goes to or comes from.

        Raises:
            ParallelConfigError: No such group rank, or this rank itself.
        """
        return check_peer(self, rank, role)

    # -- debug mode ------------------------------------------------------------------------

    def agree(
        self, operation: str, shape: Sequence[object], dtype: torch.dtype, *more: object
    ) -> None:
        """In debug mode: raise on every rank if the ranks are about to do different things."""
        if not self.debug or torch.compiler.is_compiling():
            return
        # Joined here and not by the caller: a traced caller must not turn sizes into text.
        call = agreement.describe_call(operation, shape, dtype, " ".join(map(str, more)))
        self.agree_on_text(operation, call)

    def agree_on_text(self, operation: str, call: str) -> None:
        """As `agree`, with the whole line that must be the same on every rank."""
        if not self.debug or torch.compiler.is_compiling():
            return
        self.run(
            f"{operation} (debug check)",
            lambda: agreement.agree_on_call(self._cpu(), self.ranks, self.name, call),
        )

    def agree_on_exchange(
        self, operation: str, sends: Mapping[int, str], receives: Mapping[int, str]
    ) -> None:
        """In debug mode: raise on every rank if a rank sends what its peer does not expect.

        Args:
            operation: Word for messages; the ranks have agreed on the call itself before.
            sends: What goes to each group rank, in words; nothing to those left out.
            receives: What is expected of each group rank, in the same words.
        """
        if not self.debug or torch.compiler.is_compiling():
            return
        self.run(
            f"{operation} (debug check)",
            lambda: agreement.agree_on_exchange(
                self._cpu(), self.ranks, self.name, operation, sends, receives
            ),
        )

    def agree_to_refuse(self, operation: str, error: ParallelConfigError) -> None:
        """In debug mode: tell the other ranks that this one refuses its arguments.

        Returns if every rank refuses for the same reason.

        Raises:
            RankMismatchError: On every rank alike, if another rank goes on.
        """
        self.agree_on_text(operation, f"refused {operation}: {error}")

    def _cpu(self) -> ProcessGroup:
        if not serves_cpu(str(dist.get_backend(self.cpu_group))):
            msg = (
                f"the debug mode of group {self.name!r} needs a group that moves CPU tensors; "
                "build the coordinator from rank lists, or pass cpu_group="
            )
            raise ParallelConfigError(msg)
        return self.cpu_group

    # -- collectives -----------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        """Reduce in place."""
        group = self._group_for(tensor)
        if torch.compiler.is_compiling():
            dist.all_reduce(tensor, op, group=group)
            return
        count("all_reduce", 2 * (self.size - 1) * byte_count(tensor) // self.size)
        awake = self._is_gloo(group)
        self.run(
            "all_reduce",
            lambda: wait_awake(dist.all_reduce(tensor, op, group=group, async_op=awake)),
        )

    def all_gather(self, out: Tensor, tensor: Tensor) -> None:
        """Gather equal flat pieces into ``out`` of shape ``(size * length,)``."""
        out, tensor = transportable(out), transportable(tensor)
        group = self._group_for(tensor)
        if torch.compiler.is_compiling():
            dist.all_gather_single(out, tensor, group=group)
            return
        count("all_gather", (self.size - 1) * byte_count(tensor))
        awake = self._is_gloo(group)
        self.run(
            "all_gather",
            lambda: wait_awake(dist.all_gather_single(out, tensor, group=group, async_op=awake)),
        )

    def all_to_all(
        self,
        out: Tensor,
        tensor: Tensor,
        out_sizes: list[int],
        in_sizes: list[int],
        operation: str = "all_to_all",
    ) -> None:
        """Exchange flat pieces: ``in_sizes[r]`` elements go to rank r."""
        out, tensor = transportable(out), transportable(tensor)
        group = self._group_for(tensor)
        if torch.compiler.is_compiling():
            dist.all_to_all_single(out, tensor, out_sizes, in_sizes, group=group)
            return
        sent = (tensor.numel() - in_sizes[self.rank]) * tensor.element_size()
        count(operation, sent)
        awake = self._is_gloo(group)
        self.run(
            operation,
            lambda: wait_awake(
                dist.all_to_all_single(
                    out, tensor, out_sizes, in_sizes, group=group, async_op=awake
                )
            ),
        )

    def reduce_scatter(self, out: Tensor, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        """Reduce flat pieces of equal length; piece r stays on rank r."""
        group = self._group_for(tensor)
        if torch.compiler.is_compiling():
            dist.reduce_scatter_single(out, tensor, op, group=group)
            return
        count("reduce_scatter", (self.size - 1) * byte_count(tensor) // self.size)
        self.run(
            "reduce_scatter",
            lambda: dist.reduce_scatter_single(out, tensor, op, group=group),
        )

    def broadcast(self, tensor: Tensor, src: int) -> None:
        """Fill the tensor with that of group rank ``src``, in place."""
        tensor = transportable(tensor)
        group = self._group_for(tensor)
        count("broadcast", (self.size - 1) * byte_count(tensor) if self.rank == src else 0)
        self.run("broadcast", lambda: dist.broadcast(tensor, group_src=src, group=group))

    def barrier(self) -> None:
        """Wait until every rank is here; where the backend can, name the ranks that are not."""
        self.agree("barrier", (), torch.uint8)
        if self._is_gloo(self.cpu_group):
            self.run("barrier", lambda: named_barrier(self.cpu_group, self.ranks, self.timeout))
        else:
            self.run("barrier", lambda: dist.barrier(group=self.cpu_group))

    # -- point to point --------------------------------------------------------------------

    def isend(self, tensor: Tensor, dst: int, operation: str = "send", tag: int = 0) -> PendingWork:
        """Post a send; CPU tensors travel over the CPU group.

        Args:
            tensor: Contiguous.
            dst: Group rank.
            operation: Word for the traffic count and for messages.
            tag: Messages of another tag are another stream, on backends that know tags (gloo).
        """
        payload = transportable(tensor)
        group = self._group_for_message(payload)
        count(operation, byte_count(payload))
        work = self.run(operation, lambda: dist.isend(payload, group_dst=dst, group=group, tag=tag))
        return PendingWork(self, f"{operation} to group rank {dst}", work, (payload, tensor))

    def irecv(
        self, tensor: Tensor, src: int, operation: str = "receive", tag: int = 0
    ) -> PendingWork:
        """Post a receive into a contiguous tensor; arguments as of `isend`."""
        payload = transportable(tensor)
        group = self._group_for_message(payload)
        work = self.run(operation, lambda: dist.irecv(payload, group_src=src, group=group, tag=tag))
        return PendingWork(self, f"{operation} from group rank {src}", work, (payload, tensor))

    def iexchange(
        self,
        sends: Sequence[tuple[Tensor, int]],
        receives: Sequence[tuple[Tensor, int]],
        operation: str,
    ) -> list[PendingWork]:
        """Post sends and receives as one batch, which cannot deadlock whatever their order."""
        out = [(transportable(tensor), dst) for tensor, dst in sends if tensor.numel()]
        into = [(transportable(tensor), src) for tensor, src in receives if tensor.numel()]
        count(operation, sum(byte_count(tensor) for tensor, _ in out))
        ops = [self._op(dist.isend, tensor, peer) for tensor, peer in out]
        ops += [self._op(dist.irecv, tensor, peer) for tensor, peer in into]
        keep = [tensor for tensor, _ in (*out, *into)]
        works: list[Work] = []
        # A batch belongs to one group; on every rank that of the CPU goes first.
        for group in (self.cpu_group, self.group)[self.cpu_group is self.group :]:
            batch = [op for op in ops if op.group is group]
            if batch:
                works += self.run(operation, partial(dist.batch_isend_irecv, batch))
        return [PendingWork(self, operation, work, keep) for work in works]

    def _op(self, post: Callable[..., Work | None], tensor: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(post, tensor, group=self._group_for_message(tensor), group_peer=peer)

    def gathers_slowly(self, tensor: Tensor) -> bool:
        """Whether the tensor goes over gloo, whose all_gather is slower than its all_to_all."""
        return self._is_gloo(self._group_for(tensor))

    def _is_gloo(self, group: ProcessGroup) -> bool:
        return group in self._gloo_groups

    def _group_for(self, tensor: Tensor) -> ProcessGroup:
        # A device's backend (nccl) cannot move CPU tensors, so they take the group beside it.
        return self.cpu_group if tensor.device.type == "cpu" else self.group

    def _group_for_message(self, tensor: Tensor) -> ProcessGroup:
        group = self._group_for(tensor)
        if tensor.device.type != "cpu" and self._is_gloo(group):
            kind = tensor.device.type  # gloo would read its address as one of the host
            msg = (
                f"group {self.name!r} is of gloo, which moves {kind} tensors in collectives but "
                f"not in messages, as of a ring, a halo or stages; make the group with the backend "
                f"for {kind}, or leave backend= out"
            )
            raise ParallelConfigError(msg)
        return group


def _backend(group: ProcessGroup) -> str:
    return str(dist.get_backend(group))


def check_peer(place: Place, rank: object, role: str) -> int:
    """Check a group rank that a message goes to or comes from.

    Raises:
        ParallelConfigError: There is no such group rank.
    """
    if not isinstance(rank, int) or not 0 <= rank < place.size:
        msg = (
            f"{role}={rank!r} is no group rank of group {place.name!r}, which has {place.size} "
            f"ranks; legal here: 0 to {place.size - 1} (group ranks, not global ones)"
        )
        raise ParallelConfigError(msg)
    return rank


def default_group() -> ProcessGroup:
    """Torch's default group.

    Raises:
        ParallelError: It has not been initialised.
    """
    if not dist.is_initialized() or dist.group.WORLD is None:
        msg = (
            "torch's default process group is not initialised; call "
            "omni_parallel_state.init_distributed_environment() first"
        )
        raise ParallelError(msg)
    return dist.group.WORLD
