"""One process group and everything that must hold before torch is asked to use it.

torch's backends trust their caller: on gloo a strided output, a wrong size or an unknown dtype
corrupts memory or ends the process. Every message of the project is therefore posted here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from omni_group_coordinator import agreement
from omni_group_coordinator.errors import CommunicationError, ParallelConfigError, ParallelError
from omni_group_coordinator.process_groups import ProcessGroups, serves_cpu
from omni_group_coordinator.traffic import count

T = TypeVar("T")

# What backends do not know travels unchanged as a dtype of the same size that they do know.
_CARRIERS = {
    dtype: carrier
    for name, carrier in (
        ("float8_e4m3fn", torch.uint8),
        ("float8_e4m3fnuz", torch.uint8),
        ("float8_e5m2", torch.uint8),
        ("float8_e5m2fnuz", torch.uint8),
        ("float8_e8m0fnu", torch.uint8),
        ("int16", torch.float16),
        ("uint16", torch.float16),
        ("uint32", torch.int32),
        ("uint64", torch.int64),
    )
    if (dtype := getattr(torch, name, None)) is not None
}

_keys = itertools.count()
_groups_by_key: WeakValueDictionary[str, CheckedGroup] = WeakValueDictionary()


class PendingWork:
    """A message under way. Keeps its tensors alive until `wait` returns.

    Dropping it without `wait` is a mistake: the data may never arrive.
    """

    def __init__(
        self,
        group: CheckedGroup,
        operation: str,
        work: Work | None,
        keep: Sequence[Tensor],
    ) -> None:
        self._group = group
        self._operation = operation
        self._work = work
        self._keep = tuple(keep)
        self._done = work is None

    def wait(self) -> None:
        """Return once the data may be used (on a device: by work queued after this call).

        Raises:
            CommunicationError: The peer died or the timeout of the group passed.
        """
        if self._done:
            return
        if self._work is not None:
            self._group.run(self._operation, self._work.wait)
        self._done, self._work, self._keep = True, None, ()

    def is_completed(self) -> bool:
        """Whether `wait` has returned (gloo cannot tell earlier)."""
        return self._done


def wait_all(works: Sequence[PendingWork]) -> None:
    """Wait for every work, in order."""
    for work in works:
        work.wait()


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
        self.backend = str(dist.get_backend(groups.device))
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
        return cls(groups, name=group.group_desc or group.group_name)

    def run(self, operation: str, call: Callable[[], T]) -> T:
        """Run a call of torch.distributed and say, if it fails, what it was.

        Raises:
            CommunicationError: With group, ranks, operation and the timeout.
        """
        try:
            return call()
        except ParallelError:
            raise
        except RuntimeError as error:
            raise self._failure(operation, error) from error

    def _failure(self, operation: str, error: RuntimeError) -> CommunicationError:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        after = f" (timeout {self.timeout.total_seconds():g} s)" if self.timeout else ""
        msg = (
            f"{operation} failed on rank {self.ranks[self.rank]} in group {self.name!r} of ranks "
            f"{', '.join(map(str, self.ranks))}{after}: {reason}\n"
            "A rank of the group died, hangs, or called something else. The group is unusable "
            "now: destroy the parallel state and build a new one. Set "
            f"{agreement.DEBUG_VARIABLE}=1 to have mismatched calls named."
        )
        return CommunicationError(msg, group=self.name, ranks=self.ranks, operation=operation)

    def check_reducible(self, dtype: torch.dtype) -> None:
        """Check that backends can add and compare values of a dtype.

        Raises:
            ParallelConfigError: They only carry its bits.
        """
        if dtype in _CARRIERS:
            msg = (
                f"{str(dtype).removeprefix('torch.')} cannot be reduced over ranks, only moved; "
                "nearest: float32, bfloat16, float16, int32, int64, int8 or uint8"
            )
            raise ParallelConfigError(msg)

    def peer(self, rank: int, role: str) -> int:
        """Check a group rank that a message goes to or comes from.

        Raises:
            ParallelConfigError: No such group rank, or this rank itself.
        """
        if not 0 <= rank < self.size:
            msg = (
                f"{role}={rank} is no group rank of group {self.name!r}, which has {self.size} "
                f"ranks; legal here: 0 to {self.size - 1} (group ranks, not global ones)"
            )
            raise ParallelConfigError(msg)
        return rank

    # -- debug mode ------------------------------------------------------------------------

    def agree(
        self, operation: str, shape: Sequence[object], dtype: torch.dtype, *more: object
    ) -> None:
        """In debug mode: raise on every rank if the ranks are about to do different things."""
        if not self.debug or torch.compiler.is_compiling():
            return
        # Joined here and not by the caller: a traced caller must not turn sizes into text.
        call = agreement.describe_call(operation, shape, dtype, " ".join(map(str, more)))
        self.run(
            f"{operation} (debug check)",
            lambda: agreement.agree_on_call(self._cpu(), self.ranks, self.name, call),
        )

    def agree_on_sizes(
        self, operation: str, dtype: torch.dtype, sends: Sequence[int], receives: Sequence[int]
    ) -> None:
        """In debug mode: raise on every rank if a rank sends what its peer does not expect."""
        if not self.debug or torch.compiler.is_compiling():
            return
        call = f"{operation} of dtype {str(dtype).removeprefix('torch.')}"
        self.run(
            f"{operation} (debug check)",
            lambda: agreement.agree_on_exchange(
                self._cpu(), self.ranks, self.name, call, sends, receives
            ),
        )

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
        if torch.compiler.is_compiling():
            dist.all_reduce(tensor, op, group=self.group)
            return
        count("all_reduce", 2 * (self.size - 1) * _bytes(tensor) // self.size)
        self.run("all_reduce", lambda: dist.all_reduce(tensor, op, group=self.group))

    def all_gather(self, out: Tensor, tensor: Tensor) -> None:
        """Gather equal flat pieces into ``out`` of shape ``(size * length,)``."""
        out, tensor = _transportable(out), _transportable(tensor)
        if torch.compiler.is_compiling():
            dist.all_gather_single(out, tensor, group=self.group)
            return
        count("all_gather", (self.size - 1) * _bytes(tensor))
        self.run("all_gather", lambda: dist.all_gather_single(out, tensor, group=self.group))

    def all_to_all(
        self,
        out: Tensor,
        tensor: Tensor,
        out_sizes: list[int],
        in_sizes: list[int],
        operation: str = "all_to_all",
    ) -> None:
        """Exchange flat pieces: ``in_sizes[r]`` elements go to rank r."""
        out, tensor = _transportable(out), _transportable(tensor)
        if torch.compiler.is_compiling():
            dist.all_to_all_single(out, tensor, out_sizes, in_sizes, group=self.group)
            return
        sent = (tensor.numel() - in_sizes[self.rank]) * tensor.element_size()
        count(operation, sent)
        self.run(
            operation,
            lambda: dist.all_to_all_single(out, tensor, out_sizes, in_sizes, group=self.group),
        )

    def reduce_scatter(self, out: Tensor, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        """Reduce flat pieces of equal length; piece r stays on rank r."""
        if torch.compiler.is_compiling():
            dist.reduce_scatter_single(out, tensor, op, group=self.group)
            return
        count("reduce_scatter", (self.size - 1) * _bytes(tensor) // self.size)
        self.run(
            "reduce_scatter",
            lambda: dist.reduce_scatter_single(out, tensor, op, group=self.group),
        )

    def broadcast(self, tensor: Tensor, src: int) -> None:
        """Fill the tensor with that of group rank ``src``, in place."""
        tensor = _transportable(tensor)
        group = self._group_for(tensor)
        count("broadcast", (self.size - 1) * _bytes(tensor) if self.rank == src else 0)
        self.run("broadcast", lambda: dist.broadcast(tensor, group_src=src, group=group))

    def barrier(self) -> None:
        """Wait until every rank is here; where the backend can, name the ranks that are not."""
        self.agree("barrier", (), torch.uint8)
        if str(dist.get_backend(self.cpu_group)) == "gloo":
            self.run("barrier", self._named_barrier)
        else:
            self.run("barrier", lambda: dist.barrier(group=self.cpu_group))

    def _named_barrier(self) -> None:
        # monitored_barrier is the one operation of torch that names who is missing.
        dist.monitored_barrier(self.cpu_group, timeout=self.timeout, wait_all_ranks=True)

    # -- point to point --------------------------------------------------------------------

    def isend(self, tensor: Tensor, dst: int, operation: str = "send") -> PendingWork:
        """Post a send; CPU tensors travel over the CPU group."""
        payload = _transportable(tensor)
        group = self._group_for(payload)
        count(operation, _bytes(payload))
        work = self.run(operation, lambda: dist.isend(payload, group_dst=dst, group=group))
        return PendingWork(self, f"{operation} to group rank {dst}", work, (payload, tensor))

    def irecv(self, tensor: Tensor, src: int, operation: str = "receive") -> PendingWork:
        """Post a receive into a contiguous tensor."""
        payload = _transportable(tensor)
        group = self._group_for(payload)
        work = self.run(operation, lambda: dist.irecv(payload, group_src=src, group=group))
        return PendingWork(self, f"{operation} from group rank {src}", work, (payload, tensor))

    def iexchange(
        self,
        sends: Sequence[tuple[Tensor, int]],
        receives: Sequence[tuple[Tensor, int]],
        operation: str,
    ) -> list[PendingWork]:
        """Post sends and receives as one batch, which cannot deadlock whatever their order."""
        out = [(_transportable(tensor), dst) for tensor, dst in sends if tensor.numel()]
        into = [(_transportable(tensor), src) for tensor, src in receives if tensor.numel()]
        count(operation, sum(_bytes(tensor) for tensor, _ in out))
        ops = [dist.P2POp(dist.isend, t, group=self.group, group_peer=peer) for t, peer in out]
        ops += [dist.P2POp(dist.irecv, t, group=self.group, group_peer=peer) for t, peer in into]
        if not ops:
            return []
        works = self.run(operation, lambda: dist.batch_isend_irecv(ops))
        keep = [tensor for tensor, _ in (*out, *into)]
        return [PendingWork(self, operation, work, keep) for work in works]

    def _group_for(self, tensor: Tensor) -> ProcessGroup:
        return self.cpu_group if tensor.device.type == "cpu" else self.group


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


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _transportable(tensor: Tensor) -> Tensor:
    carrier = _CARRIERS.get(tensor.dtype)
    return tensor if carrier is None else tensor.view(carrier)
