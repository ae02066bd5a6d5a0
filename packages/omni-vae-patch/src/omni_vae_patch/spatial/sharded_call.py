"""One call of an autoencoder on shards, from the whole input to the whole output."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from omni_group_coordinator import CommunicationError, GroupCoordinator, ParallelError
from omni_vae_patch.spatial.agreement import agreed, raise_report, report_of
from omni_vae_patch.spatial.partition import Partition
from omni_vae_patch.spatial.region import Region
from omni_vae_patch.spatial.shard import SpatialShard
from omni_vae_patch.spatial.whole_outputs import sharded_tensor, with_tensor
from omni_vae_patch.vae_config import Result

_log = logging.getLogger("omni_vae_patch")
Call = Callable[[Tensor], Any]


class ShardedCall:
    """Calls an autoencoder on this rank's part, and joins what the ranks get.

    An error on one rank is raised on all of them, whatever they were about to exchange, and the
    group can be used again.

    Args:
        group: The ranks.
        region: That of the autoencoder's rules.
        result: Who gets the whole.
    """

    def __init__(self, group: GroupCoordinator, region: Region, result: Result) -> None:
        self._group = group
        self._region = region
        self._result = result

    def __call__(self, call: Call, x: Tensor, partition: Partition, factor: int) -> Any:
        """Make a call.

        Args:
            call: The autoencoder's own method, of the tensor alone.
            x: The whole input, the same on every rank.
            partition: Rows of the coarsest feature map.
            factor: Rows of the input for each of these.

        Raises:
            ParallelError: It failed on another rank; on this one its own error.
        """
        me, dim = self._group.rank_in_group, partition.dim
        mine = partition.rows[me]

        def part() -> Tensor:
            start = partition.start(me) if mine else 0
            rows = mine or partition.rows[0]
            return x.narrow(dim, start * factor, rows * factor).contiguous()

        local = agreed(self._group, "taking a part of the input", part)
        output, error = (self._on_shard if mine else self._alone)(call, local, partition)
        return self._joined(output, error, partition)

    def _alone(
        self, call: Call, local: Tensor, partition: Partition
    ) -> tuple[Any, Exception | None]:
        """On a rank without rows, for the kind of the output."""
        try:
            with self._region.of(None, idle=partition):
                return call(local), None
        except Exception as error:
            return None, error

    def _on_shard(
        self, call: Call, local: Tensor, partition: Partition
    ) -> tuple[Any, Exception | None]:
        shard = SpatialShard(self._group, partition)
        try:
            with self._region.of(shard):
                return call(local), None
        except CommunicationError:
            raise  # the group is gone
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # what they hold may be all there is
            self._drain(call, local, shard)
            return None, error

    def _drain(self, call: Call, local: Tensor, shard: SpatialShard) -> None:
        # Private, but what torch.compile rests on; checked on torch 2.13.
        from torch._subclasses.fake_tensor import FakeTensorMode

        shard.drain()
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), self._region.of(shard):
                call(torch.empty(local.shape, dtype=local.dtype, device=local.device))
        except Exception:
            _log.exception("could not tell the other ranks that this one failed")

    # -- what the ranks have ---------------------------------------------------------------

    def _joined(self, output: Any, error: Exception | None, partition: Partition) -> Any:
        tensor = None if error is not None else sharded_tensor(output)
        shape = None if tensor is None else (list(tensor.shape), tensor.dtype)
        said = self._group.all_gather_object([report_of(error), shape])
        if error is not None:
            raise error
        for rank, (report, _) in enumerate(said):
            if report is not None:
                raise_report("the autoencoder", self._group.ranks[rank], report)
        if tensor is None:
            msg = "a call without an error has no output"
            raise ParallelError(msg)
        me, dim = self._group.rank_in_group, partition.dim
        lengths = [
            found[1][0][dim] if rows else 0
            for found, rows in zip(said, partition.rows, strict=True)
        ]
        if not partition.rows[me]:
            empty, dtype = said[0][1]
            empty[dim] = 0
            tensor = torch.empty(empty, dtype=dtype, device=tensor.device)
        self._make_room(tensor, dim, lengths)
        whole = self._whole(tensor, dim % tensor.ndim, lengths)
        return None if whole is None else with_tensor(output, whole)

    def _make_room(self, tensor: Tensor, dim: int, lengths: list[int]) -> None:
        """See on every rank that the whole fits, before any waits for the others' parts."""

        def room() -> None:
            if self._result == "all" or self._group.rank_in_group == 0:
                shape = list(tensor.shape)
                shape[dim] = sum(lengths)
                torch.empty(shape, dtype=tensor.dtype, device=tensor.device)

        agreed(self._group, "making room for the result", room)

    def _whole(self, tensor: Tensor, dim: int, lengths: list[int]) -> Tensor | None:
        if self._result == "first":
            return self._group.gather(tensor, 0, dim, lengths=lengths)
        return self._group.all_gather(tensor, dim, lengths=lengths)
