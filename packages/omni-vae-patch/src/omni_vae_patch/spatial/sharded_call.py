"""One call of an autoencoder on shards, from the whole input to the whole output."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor  # private, but what torch.compile rests on

from omni_group_coordinator import CommunicationError, GroupCoordinator
from omni_vae_patch.agreement import Attempt, agreed, settle
from omni_vae_patch.attributes import attributes_kept
from omni_vae_patch.spatial.cast_weights import cast_without_content
from omni_vae_patch.spatial.partition import Partition
from omni_vae_patch.spatial.region import Region
from omni_vae_patch.spatial.shard import SpatialShard
from omni_vae_patch.spatial.steps import Taken
from omni_vae_patch.spatial.whole_outputs import sharded_tensor, with_tensor
from omni_vae_patch.vae_config import Result

_log = logging.getLogger("omni_vae_patch")
Call = Callable[[Tensor], Any]
_REMEMBERED = 64

# What code raises that looks at values, where there are none.
_NEEDS_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    NotImplementedError,
)


class ShardedCall:
    """Calls an autoencoder on this rank's part, and joins what the ranks get.

    An error on one rank is raised on all of them, whatever they were about to exchange, and the
    group can be used again.

    Args:
        group: The ranks.
        vae: The autoencoder.
        region: That of the autoencoder's rules.
        result: Who gets the whole.
    """

    def __init__(
        self, group: GroupCoordinator, vae: nn.Module, region: Region, result: Result
    ) -> None:
        self._group = group
        self._vae = vae
        self._region = region
        self._result = result
        self._steps: dict[Any, list[Taken]] = {}
        self._told = False

    def __call__(
        self, call: Call, x: Tensor, partition: Partition, factor: int, like: str = ""
    ) -> Any:
        """Make a call.

        Args:
            call: The autoencoder's own method, of the tensor alone.
            x: The whole input, the same on every rank.
            partition: Rows of the coarsest feature map.
            factor: Rows of the input for each of these.
            like: The same for calls that communicate the same if the input has the same shape.

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
        if mine:
            output, error = self._on_shard(call, local, partition, like)
        else:
            output, error = self._alone(call, local, partition)
        return self._joined(output, error, partition)

    def _alone(
        self, call: Call, local: Tensor, partition: Partition
    ) -> tuple[Any, Exception | None]:
        """On a rank without rows, for the kind of the output."""
        try:
            with self._region.of(None, idle=partition):
                try:
                    return self._without_content(call, local), None
                except _NEEDS_VALUES as error:
                    if not self._told:
                        self._told = True
                        msg = "a rank without rows decodes for the kind of the result: %s"
                        _log.warning(msg, error)
                    return call(local), None
        except Exception as error:
            return None, error

    def _on_shard(
        self, call: Call, local: Tensor, partition: Partition, like: str
    ) -> tuple[Any, Exception | None]:
        shard = SpatialShard(self._group, partition)
        alike = (like, tuple(local.shape), local.dtype, partition)
        try:
            with self._region.of(shard):
                output = call(local)
        except CommunicationError:
            raise  # the group is gone
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # what they hold may be all there is
            self._drain(call, local, shard, error, self._steps.get(alike))
            return None, error
        if len(self._steps) >= _REMEMBERED:
            self._steps.clear()
        self._steps[alike] = shard.taken
        return output, None

    def _drain(
        self,
        call: Call,
        local: Tensor,
        shard: SpatialShard,
        error: Exception,
        known: list[Taken] | None,
    ) -> None:
        """Take part in what the other ranks still communicate; ``known``: by an earlier call."""
        shard.drain()
        try:
            with self._region.of(shard):
                self._without_content(call, local)
        except CommunicationError:
            raise
        except Exception as again:
            if known is not None:
                shard.replay(known)
            else:
                error.add_note(
                    "This rank could not go through the call without computing, to the end of the "
                    f"other ranks' ({type(again).__name__}: {again}); where they have not met the "
                    "same error, they wait for it until the timeout of the group."
                )

    def _without_content(self, call: Call, local: Tensor) -> Any:
        """A call that computes nothing; its output has a kind and a shape."""
        # Without torch._dynamo, which takes seconds to import, nothing has been compiled.
        compiles = "torch._dynamo" in sys.modules
        eager = torch.compiler.set_stance("force_eager") if compiles else nullcontext()
        mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
        with attributes_kept(self._vae), eager, mode:
            cast_without_content(self._vae)
            return call(torch.empty(local.shape, dtype=local.dtype, device=local.device))

    # -- what the ranks have ---------------------------------------------------------------

    def _joined(self, output: Any, error: Exception | None, partition: Partition) -> Any:
        attempt = (
            Attempt.of(lambda: sharded_tensor(output)) if error is None else Attempt(None, error)
        )
        tensor: Tensor = attempt.value
        shape = None if attempt.error is not None else [list(tensor.shape), tensor.dtype]
        said = settle(self._group, "the autoencoder", attempt, shape, asks=True) or []
        me, dim = self._group.rank_in_group, partition.dim
        lengths = [
            sizes[dim] if rows else 0 for (sizes, _), rows in zip(said, partition.rows, strict=True)
        ]
        if not partition.rows[me]:
            empty, dtype = said[0]
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
