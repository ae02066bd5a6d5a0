"""Guidance branches of a pipeline in stages: each is one flow, and columns of ranks share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from omni_group_coordinator import CommunicationError, GroupCoordinator, ParallelError
from omni_parallel_state.denoising.alike import check_alike
from omni_pp.async_latents import resolved
from omni_pp.mixin.first_inputs import agreed_inputs
from omni_pp.mixin.host_link import HostLink, stream_name
from omni_pp.mixin.stage_steps import Failed, Run, StageSteps, text_of

Prediction = Tensor | tuple[Tensor, ...]


class StagedBranches:
    """Predicts the branches of a step, over stages and, beside these, over a guidance group.

    Branch i belongs to rank ``i % size`` of the guidance group, on every stage; so each column of
    stages runs its own branches, one behind the other. The last stages of the columns then give
    each other what theirs have predicted.

    Args:
        stages: The ranks of one column.
        columns: The ranks of one stage.
        name: Tells the streams of one pipeline from those of others.
        seeds: What happens when columns start from different latents.
    """

    def __init__(
        self,
        stages: GroupCoordinator,
        columns: GroupCoordinator,
        name: str,
        seeds: Literal["error", "broadcast"],
    ) -> None:
        self.stages = stages
        self.columns = columns
        self.steps = StageSteps(stages, name)
        self._link = HostLink(columns)
        self._name = name
        self._seeds = seeds
        self._is_first = True

    def begin(self) -> None:
        """A new request: the ranks compare what they start from."""
        self._is_first = True

    def predict(
        self, branches: Sequence[dict[str, Any]], predict: Run, output_slice: int | None
    ) -> list[Prediction] | None:
        """The predictions of all branches, on the last stage; ``None`` elsewhere.

        Args:
            branches: Arguments of each.
            predict: Runs this stage's part.
            output_slice: Keep so many tokens of each.

        Raises:
            Exception: What this rank's part has failed with.
            ParallelError: That of another rank has.
            RankMismatchError: The ranks start from different inputs.
        """
        self.steps.start()
        if self._is_first:
            branches = [{key: resolved(value) for key, value in one.items()} for one in branches]
            branches = agreed_inputs(self.stages, self.columns, branches, self._seeds)
            self._is_first = False
        names = [stream_name(branch) for branch in branches]
        owners = [index % self.columns.world_size for index in range(len(branches))]
        is_shared = len(branches) > 1 and self.columns.world_size > 1
        me = self.columns.rank_in_group
        work = {
            index: (name, branches[index])
            for index, name in enumerate(names)
            if owners[index] == me or not is_shared
        }
        part = partial(_sliced, predict, output_slice) if self.steps.is_last else predict
        with self.steps.telling():
            found = self.steps.run(work, part)
            if not self.steps.is_last:
                return None
            error = self._failure(found)
            if is_shared:
                streams = [f"{self._name} prediction {output_slice} {name}" for name in names]
                predictions = self._share(streams, owners, found, error)
            elif error is not None:
                raise error
            else:
                predictions = list(found.values())
            check_alike(predictions)
            return predictions

    def _failure(self, found: Mapping[int, Any]) -> Exception | None:
        failed = [one.error for one in found.values() if isinstance(one, Failed)]
        if not failed:
            return None
        return self.steps.fail(next((error for error in failed if error is not None), None))

    # -- over columns ----------------------------------------------------------------------

    def _share(
        self,
        streams: Sequence[str],
        owners: Sequence[int],
        mine: Mapping[int, Any],
        error: Exception | None,
    ) -> list[Any]:
        """The predictions of all columns' branches, on the last stage of each."""
        arrivals = {}
        me = self.columns.rank_in_group
        for peer in range(self.columns.world_size):
            if peer == me:
                continue
            # Of each pair the lower sends first: backends that queue messages need an order.
            for is_sending in (me < peer, me > peer):
                if is_sending:
                    error = self._send(streams, mine, peer, error)
                    continue
                for index, owner in enumerate(owners):
                    if owner == peer:
                        arrivals[index] = self._link.expect(streams[index], peer, reuse=False)
        is_well = [arrival.wait() for arrival in arrivals.values()]
        self._link.finish()
        if error is not None or not all(is_well):
            raise self._told(error)
        values = dict(mine) | {index: arrival.value() for index, arrival in arrivals.items()}
        return [values[index] for index in range(len(streams))]

    def _send(
        self, streams: Sequence[str], mine: Mapping[int, Any], peer: int, error: Exception | None
    ) -> Exception | None:
        for index, value in mine.items():
            try:
                if error is None:
                    self._link.send(streams[index], value, peer)
                    continue
            except CommunicationError:
                raise
            except ParallelError as refusal:
                error = refusal
            self._link.send_failure(streams[index], peer)
        return error

    def _told(self, error: Exception | None) -> Exception:
        said = self.columns.all_gather_object(None if error is None else text_of(error))
        if error is not None:
            return error
        texts = [
            f"in column {column} of the guidance group: {text}"
            for column, text in enumerate(said)
            if text
        ]
        return ParallelError("; ".join(texts) or "a guidance branch failed, and none says how")


def _sliced(predict: Run, tokens: int | None, **kwargs: Any) -> Any:
    found = resolved(predict(**kwargs))
    items = found if isinstance(found, tuple) else (found,)
    if not all(isinstance(item, torch.Tensor) for item in items):
        msg = (
            f"predict_noise returned a {type(found).__name__} on the last stage; legal there: a "
            "tensor, or a tuple of tensors"
        )
        raise ParallelError(msg)
    if tokens is None:
        return found
    items = tuple(item[:, :tokens] for item in items)
    return items if isinstance(found, tuple) else items[0]
