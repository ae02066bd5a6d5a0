"""`PipelineGroupCoordinator`: the stages of a pipeline, and the stream of tensors between them."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Unpack

import torch
from torch import Tensor
from torch.distributed import Backend

from omni_group_coordinator.checked_group import CheckedGroup
from omni_group_coordinator.coordinator import GroupCoordinator
from omni_group_coordinator.errors import ParallelConfigError, ParallelError
from omni_group_coordinator.membership import GroupOptions
from omni_group_coordinator.messages import TensorSpec
from omni_group_coordinator.pending_work import PendingWork, wait_all
from omni_group_coordinator.process_groups import ProcessGroups

_SKIP = "skip"


class PipelineGroupCoordinator(GroupCoordinator):
    """Stages in rank order; the last one's next is the first.

    A stream between two stages has a name and a segment (a patch or micro-batch, -1 for the
    whole). Only its first message carries metadata; where the receiver declared a buffer, a
    first message of another shape or dtype is an error. Every receive makes a new tensor, so
    what was received stays valid.

    Stages send to each other over two groups: one for messages to a later stage, one for those
    to an earlier one (the way back to the first stage, and skip connections). On backends that
    queue the messages of a pair (nccl), two sends that cross would wait for each other.

    Arguments are those of `GroupMembership`.
    """

    def __init__(
        self,
        group_ranks: list[list[int]],
        local_rank: int,
        torch_distributed_backend: str | Backend,
        **options: Unpack[GroupOptions],
    ) -> None:
        backend = str(torch_distributed_backend)
        pool = options.get("pool")
        options.setdefault("name", "pp")
        super().__init__(group_ranks, local_rank, backend, **options)
        pool = self._pool if pool is None else pool
        if pool is not None:
            name = f"{self.name} backward"
            self._back = self._backward(pool.groups_for(group_ranks, variant="backward", name=name))

    def _backward(self, groups: ProcessGroups | None) -> CheckedGroup | None:
        if self.checked is None or groups is None:
            return None
        return CheckedGroup(
            groups,
            name=f"{self.name} backward",
            timeout=self.checked.timeout,
            debug=self.checked.debug,
        )

    def _attach(
        self, groups: ProcessGroups | None, timeout: timedelta | None, debug: bool | None
    ) -> None:
        super()._attach(groups, timeout, debug)
        self._back = None
        self._stream = _Stream()

    def _direction(self, peer: int, role: str) -> CheckedGroup:
        forward = (peer > self.rank_in_group) == (role == "dst")
        if forward or self._back is None:
            return super()._direction(peer, role)
        return self._back

    def destroy(self) -> None:
        """Give up the group; a second call does nothing."""
        self._back = None
        super().destroy()

    # -- declared buffers ------------------------------------------------------------------

    def set_config(self, dtype: torch.dtype) -> None:
        """Set the dtype that buffers have when `set_recv_buffer` is given none."""
        self._stream.dtype = dtype

    def set_recv_buffer(
        self,
        num_pipefusion_patches: int,
        patches_shape_list: Sequence[Sequence[int]],
        feature_map_shape: Sequence[int],
        dtype: torch.dtype | None = None,
    ) -> None:
        """Declare what the stream ``"latent"`` brings: the whole, and each patch.

        Args:
            num_pipefusion_patches: Number of patches.
            patches_shape_list: Shape of each patch, one for each.
            feature_map_shape: Shape of the whole.
            dtype: Of all of them; default: that of `set_config`.

        Raises:
            ParallelConfigError: Not one shape for each patch, or no dtype is known.
        """
        if len(patches_shape_list) != num_pipefusion_patches:
            msg = (
                f"num_pipefusion_patches={num_pipefusion_patches}, but patches_shape_list has "
                f"{len(patches_shape_list)} shapes; it needs one for each patch"
            )
            raise ParallelConfigError(msg)
        self._declare("latent", feature_map_shape, patches_shape_list, dtype)

    def set_extra_tensors_recv_buffer(
        self,
        name: str,
        shape: Sequence[int],
        num_buffers: int = 1,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        """Declare what another stream brings: segments 0 to ``num_buffers - 1`` and the whole."""
        self._declare(name, shape, [shape] * num_buffers, dtype)

    def set_skip_tensor_recv_buffer(
        self,
        patches_shape_list: Sequence[Sequence[int]],
        feature_map_shape: Sequence[int],
    ) -> None:
        """Declare what the skip connection brings; the dtype is that of `set_config`."""
        self._declare(_SKIP, feature_map_shape, patches_shape_list, None)

    def _declare(
        self,
        name: str,
        whole: Sequence[int],
        segments: Sequence[Sequence[int]],
        dtype: torch.dtype | None,
    ) -> None:
        dtype = dtype or self._stream.dtype
        if dtype is None:
            msg = f"no dtype is known for the stream {name!r}; pass dtype= or call set_config first"
            raise ParallelConfigError(msg)
        for index, shape in ((-1, whole), *enumerate(segments)):
            spec = TensorSpec(torch.Size(shape), dtype, self.device.type)
            self.register_recv_channel(_channel(name, index), {name: spec})

    def reset_buffer(self) -> None:
        """Wait for sends under way and forget every stream; call it on all stages."""
        self.wait_sends()
        self.reset_channels()
        self._stream = _Stream()

    # -- sending ---------------------------------------------------------------------------

    def pipeline_send(self, tensor: Tensor, name: str = "latent", segment_idx: int = -1) -> None:
        """Send to the next stage and return when the tensor may change."""
        wait_all(self._send(tensor, name, segment_idx, self.group_next_rank))

    def pipeline_isend(self, tensor: Tensor, name: str = "latent", segment_idx: int = -1) -> None:
        """Start sending to the next stage; the tensor must not change before `wait_sends`."""
        self._stream.sends += self._send(tensor, name, segment_idx, self.group_next_rank)

    def pipeline_send_skip(self, tensor: Tensor, segment_idx: int = -1) -> None:
        """Send to the mirror stage (`group_skip_rank`) and return when the tensor may change."""
        wait_all(self._send(tensor, _SKIP, segment_idx, self.group_skip_rank))

    def pipeline_isend_skip(self, tensor: Tensor, segment_idx: int = -1) -> None:
        """Start sending to the mirror stage; the tensor must not change before `wait_sends`."""
        self._stream.sends += self._send(tensor, _SKIP, segment_idx, self.group_skip_rank)

    def wait_sends(self) -> None:
        """Wait for every send that was started."""
        works, self._stream.sends = self._stream.sends, []
        wait_all(works)

    def _send(self, tensor: Tensor, name: str, segment: int, dst: int) -> list[PendingWork]:
        return self.isend_registered(_channel(name, segment), {name: tensor}, dst)

    # -- receiving -------------------------------------------------------------------------

    def pipeline_recv(self, idx: int = -1, name: str = "latent") -> Tensor:
        """Wait for a tensor of the previous stage."""
        return self._receive(name, idx, self.group_prev_rank).get()

    def pipeline_recv_skip(self, idx: int = -1) -> Tensor:
        """Wait for a tensor of the mirror stage."""
        return self._receive(_SKIP, idx, self.group_skip_rank).get()

    def add_pipeline_recv_task(self, idx: int = -1, name: str = "latent") -> None:
        """Queue a receive from the previous stage; `recv_next` starts it."""
        self._stream.tasks.append((name, idx))

    def add_pipeline_recv_skip_task(self, idx: int = -1) -> None:
        """Queue a receive from the mirror stage; `recv_skip_next` starts it."""
        self._stream.skip_tasks.append((_SKIP, idx))

    def recv_next(self) -> None:
        """Start the receive that has been queued longest.

        Raises:
            ParallelError: None is queued.
        """
        self._start(self._stream.tasks, self.group_prev_rank)

    def recv_skip_next(self) -> None:
        """Start the skip receive that has been queued longest.

        Raises:
            ParallelError: None is queued.
        """
        self._start(self._stream.skip_tasks, self.group_skip_rank)

    def get_pipeline_recv_data(self, idx: int = -1, name: str = "latent") -> Tensor:
        """Wait for what a started receive brings.

        Raises:
            ParallelError: No receive of this stream and segment has been started.
        """
        started = self._stream.started[name, idx]
        if not started:
            msg = (
                f"no receive of stream {name!r}, segment {idx}, has been started; call "
                "add_pipeline_recv_task and recv_next first"
            )
            raise ParallelError(msg)
        return started.popleft().get()

    def get_pipeline_recv_skip_data(self, idx: int = -1) -> Tensor:
        """As `get_pipeline_recv_data`, for the skip connection."""
        return self.get_pipeline_recv_data(idx, _SKIP)

    def _start(self, tasks: deque[tuple[str, int]], src: int) -> None:
        if not tasks:
            msg = "recv_next without a queued receive; call add_pipeline_recv_task first"
            raise ParallelError(msg)
        name, idx = tasks.popleft()
        self._stream.started[name, idx].append(self._receive(name, idx, src))

    def _receive(self, name: str, idx: int, src: int) -> _Arrival:
        self._peer(src, src, "src")  # a stage that has no such peer has nothing to receive
        tensors, works = self.irecv_registered(_channel(name, idx), src)
        return _Arrival(tensors[name], works)


class _Arrival:
    """A tensor under way."""

    def __init__(self, tensor: Tensor, works: Sequence[PendingWork]) -> None:
        self._tensor = tensor
        self._works = works

    def get(self) -> Tensor:
        wait_all(self._works)
        return self._tensor


class _Stream:
    """What is queued, started and sent between the stages."""

    def __init__(self) -> None:
        self.dtype: torch.dtype | None = None
        self.sends: list[PendingWork] = []
        self.tasks: deque[tuple[str, int]] = deque()
        self.skip_tasks: deque[tuple[str, int]] = deque()
        # Several receives of one segment may be under way: they are got in the order of start.
        self.started: defaultdict[tuple[str, int], deque[_Arrival]] = defaultdict(deque)


def _channel(name: str, segment: int) -> str:
    return f"{name}/{segment}"
