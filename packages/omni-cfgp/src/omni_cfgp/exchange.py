"""Giving every rank what each of them has computed, in one collective."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omni_cfgp.failure_marks import MARK_BYTES, FailureMarks, marked
from omni_cfgp.outcome import Outcome
from omni_group_coordinator import GroupCoordinator, ParallelError, RankMismatchError
from omni_parallel_state.denoising.signature import same_inputs
from omni_parallel_state.denoising.structure import Plain, rebuild, tensor_specs, tensors_in


@dataclass(frozen=True)
class Work:
    """One piece of work, which one rank does and all want the result of."""

    owner: int
    """Group rank."""
    key: Hashable
    """Work of one key has results of one shape; the same on every rank."""
    name: str
    """For messages."""
    inputs: tuple[float, ...] = ()
    """Fingerprint of what it is given, if that is to be compared over the ranks."""


class BranchExchange:
    """Exchanges the results of a step.

    The first time that a kind of work is met, the ranks tell each other what its results look
    like. After that a step costs one collective of the predictions and nothing else.

    Args:
        group: The ranks.
    """

    def __init__(self, group: GroupCoordinator) -> None:
        self.group = group
        self._known: dict[Hashable, Plain] = {}
        self._marks = FailureMarks()
        self._works: Sequence[Work] = ()  # of the last step

    def exchange(self, works: Sequence[Work], mine: Mapping[int, Outcome]) -> list[Any]:
        """The results of all works, on every rank.

        Args:
            works: Of this step, the same on every rank.
            mine: What this rank has done, by index.

        Raises:
            ParallelError: A work of another rank failed; the message names rank, work and error.
            Exception: A work of this rank failed: its own error.
            RankMismatchError: The ranks do not do the same works.
        """
        self.settle()
        self._works = works
        if any(work.inputs or self._is_new(work) for work in works):
            mine = self._meet(works, mine)
        specs = [self._known[work.key] for work in works]
        return self._gather(works, specs, mine)

    def settle(self) -> None:
        """Raise what a rank met in the last step, if one has met an error.

        On the CPU that is known at once, elsewhere at the next step, so that no rank has to wait
        for its device within one.
        """
        if failed := self._marks.failed():
            self._raise(failed, {})

    def known(self, key: Hashable) -> Plain | None:
        """What results of a key look like, if any has been exchanged."""
        return self._known.get(key)

    # -- the first time --------------------------------------------------------------------

    def _is_new(self, work: Work) -> bool:
        plain = self._known.get(work.key)
        return plain is None or _size(plain, torch.uint8) < MARK_BYTES

    def _meet(self, works: Sequence[Work], mine: Mapping[int, Outcome]) -> Mapping[int, Outcome]:
        done, plains = {}, {}
        for index, outcome in mine.items():
            plains[index], done[index] = outcome.described()
        reports = {index: text for index, o in done.items() if (text := o.report()) is not None}
        asked = [[work.owner, work.name, repr(work.key)] for work in works]
        inputs = [work.inputs for work in works]
        said = self.group.all_gather_object([asked, inputs, plains, reports])
        self._check_same(works, [(other, given) for other, given, _, _ in said])
        failed = [(rank, texts) for rank, (*_, texts) in enumerate(said) if texts]
        if failed:
            self._raise_reports(failed, done)
        for _, _, found, _ in said:
            for index, plain in found.items():
                self._known[works[index].key] = plain
        return done

    def _check_same(
        self, works: Sequence[Work], said: Sequence[tuple[list[Any], list[tuple[float, ...]]]]
    ) -> None:
        first, inputs = said[0]
        if any(asked != first for asked, _ in said):
            lines = [f"  rank {rank}: {_named(asked)}" for rank, (asked, _) in enumerate(said)]
            msg = "the ranks of one image do not compute the same branches:\n" + "\n".join(lines)
            raise RankMismatchError(msg)
        for rank, (_, others) in enumerate(said):
            for work, one, other in zip(works, inputs, others, strict=True):
                if not same_inputs(one, other):
                    msg = (
                        f"{work.name} has other inputs on group rank {rank} than on group rank 0; "
                        "the ranks of one image need the same latents and prompts: seed them alike"
                    )
                    raise RankMismatchError(msg)

    # -- every time ------------------------------------------------------------------------

    def _gather(
        self, works: Sequence[Work], specs: Sequence[Plain], mine: Mapping[int, Outcome]
    ) -> list[Any]:
        world, me = self.group.world_size, self.group.rank_in_group
        dtypes = {dtype for plain in specs for _, dtype in tensor_specs(plain)}
        carrier = dtypes.pop() if len(dtypes) == 1 else torch.uint8
        owned = [[i for i, work in enumerate(works) if work.owner == rank] for rank in range(world)]
        sizes = [sum(_size(specs[i], carrier) for i in indices) for indices in owned]
        device = self.group.device
        mine = {index: self._as_known(outcome, specs[index]) for index, outcome in mine.items()}
        if any(outcome.error is not None for outcome in mine.values()):
            flat = marked(sizes[me], carrier, device)
        else:
            flat = _packed([mine[i].value for i in owned[me]], carrier, device)
        whole = self.group.all_gather(flat, 0, lengths=sizes)
        # Unsafe for gradients alone; a change in place of one result is none of another's.
        parts = torch.unsafe_split_with_sizes(whole, sizes)
        self._marks.note(parts)
        if any(outcome.error is not None for outcome in mine.values()):
            self._raise([], mine)
        if failed := self._marks.failed_at_once():
            self._raise(failed, mine)
        results: list[Any] = [None] * len(works)
        for indices, part in zip(owned, parts, strict=True):
            pieces = torch.unsafe_split_with_sizes(
                part, [_size(specs[i], carrier) for i in indices]
            )
            for index, piece in zip(indices, pieces, strict=True):
                results[index] = _unpacked(specs[index], piece)
        return results

    def _as_known(self, outcome: Outcome, plain: Plain) -> Outcome:
        found, outcome = outcome.described()
        if outcome.error is None and found != plain:
            msg = (
                f"a denoiser returned {_shapes(found)} where it returned {_shapes(plain)} for the "
                "same inputs before"
            )
            return Outcome(error=ParallelError(msg))
        return outcome

    def forget(self) -> None:
        """Forget the last step, which was broken off."""
        self._marks.clear()

    # -- errors ----------------------------------------------------------------------------

    def _raise(self, failed: Sequence[int], mine: Mapping[int, Outcome]) -> None:
        """Tell each other what went wrong; ``failed`` is only needed by those who know none."""
        self._marks.clear()
        reports = {i: text for i, o in mine.items() if (text := o.report()) is not None}
        said = self.group.all_gather_object(reports)
        texts = [(rank, found) for rank, found in enumerate(said) if found]
        self._raise_reports(texts or [(rank, {0: "unknown"}) for rank in failed], mine)

    def _raise_reports(
        self,
        failed: Sequence[tuple[int, Mapping[int, str]]],
        mine: Mapping[int, Outcome],
    ) -> None:
        _raise_own(mine)
        rank, texts = failed[0]
        index, text = next(iter(texts.items()))
        msg = f"{self._works[index].name} failed on rank {self.group.ranks[rank]}: {text}"
        raise ParallelError(msg)


def _raise_own(mine: Mapping[int, Outcome]) -> None:
    for outcome in mine.values():
        if outcome.error is not None:
            raise outcome.error


def _named(asked: Sequence[Sequence[Any]]) -> str:
    return ", ".join(f"{name} on group rank {owner} of {key}" for owner, name, key in asked)


def _shapes(plain: Plain) -> str:
    return ", ".join(
        f"{str(dtype).removeprefix('torch.')} {shape}" for shape, dtype in tensor_specs(plain)
    )


def _size(plain: Plain, carrier: torch.dtype) -> int:
    """Elements of the carrier that a result takes."""
    return sum(
        torch.Size(shape).numel() * (1 if dtype == carrier else dtype.itemsize)
        for shape, dtype in tensor_specs(plain)
    )


def _packed(values: Sequence[Any], carrier: torch.dtype, device: torch.device) -> Tensor:
    flat = [tensor.reshape(-1) for value in values for tensor in tensors_in(value)]
    rows = [t if t.dtype == carrier else t.contiguous().view(torch.uint8) for t in flat]
    if len(rows) == 1:
        return rows[0]
    return torch.cat(rows) if rows else torch.empty(0, dtype=carrier, device=device)


def _unpacked(plain: Plain, piece: Tensor) -> Any:
    specs = tensor_specs(plain)
    counts = [torch.Size(shape).numel() for shape, _ in specs]
    sizes = [
        count * (1 if dtype == piece.dtype else dtype.itemsize)
        for count, (_, dtype) in zip(counts, specs, strict=True)
    ]
    tensors = []
    for part, (shape, dtype) in zip(
        torch.unsafe_split_with_sizes(piece, sizes), specs, strict=True
    ):
        if dtype != piece.dtype:
            part = part.clone().view(dtype)  # noqa: PLW2901  memory of its own: aligned for the dtype
        tensors.append(part.view(shape))
    return rebuild(plain, iter(tensors))
