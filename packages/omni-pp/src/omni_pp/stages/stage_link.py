"""What stages send each other: trees of tensors, whose structure travels at the first use only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from omni_group_coordinator import GroupCoordinator, PendingWork, RankMismatchError, wait_all
from omni_parallel_state.denoising.structure import (
    Plain,
    describe,
    rebuild,
    tensor_specs,
    tensors_in,
)

_STATUS = "status"
_opened: WeakKeyDictionary[GroupCoordinator, int] = WeakKeyDictionary()
_SLOTS = 2  # one is computed on while the next arrives


class StageLink:
    """Named streams of trees of tensors between the ranks of a pipeline.

    Both sides use the streams between them in the same order. The first message of a stream tells
    its structure and shapes, and no later one does. A stage that has failed sends, in place of
    what it owes, zeros with a status; before the first message, that there is nothing.

    Args:
        group: The ranks, in the order of the stages.
    """

    def __init__(self, group: GroupCoordinator) -> None:
        self._group = group
        self._name = ""
        self._sent: dict[tuple[str, int], Plain] = {}
        self._incoming: dict[tuple[str, int], _Incoming] = {}
        self._sends: list[PendingWork] = []
        self._older: list[PendingWork] = []

    def open(self) -> None:
        """Take a name for the streams that no earlier link over these ranks has; a collective.

        The channels of a group stay what they were opened as, while a pipeline that is cut anew,
        or another one, has flows of other shapes by the same names.
        """
        number = max(self._group.all_gather_object(_opened.get(self._group, 0))) + 1
        _opened[self._group] = number
        self._name = f"link {number} "

    def send(self, stream: str, value: Any, dst: int, status: Tensor | None = None) -> Sent:
        """Start sending a tree; its tensors must not change before `finish`.

        Args:
            stream: The stream; always of trees of one structure and one set of shapes.
            value: The tree.
            dst: Group rank.
            status: That of the flow that it was made of, if any.

        Raises:
            ParallelError: The tree holds something that does not travel.
            RankMismatchError: It differs from the first one in more than the elements of tensors.
        """
        structure, works = describe(value), []
        known = self._sent.get((stream, dst))
        if known is None:
            works += self._group.isend_tensor_dict({"structure": structure}, dst)
            self._sent[stream, dst] = structure
        elif known != structure:
            msg = (
                f"for inputs of the same shapes a stage gave {_text(known)} before, and "
                f"{_text(structure)} now; what changes from step to step must be the content of "
                "tensors"
            )
            raise RankMismatchError(msg)
        tensors = tensors_in(value)
        named = {str(index): tensor for index, tensor in enumerate(tensors)}
        named[_STATUS] = self.status(0) if status is None else status
        works += self._group.isend_registered(self._name + stream, named, dst)
        self._sends += works
        return Sent(tensors, works)

    def send_failure(self, stream: str, dst: int) -> Any:
        """Tell, in place of a tree, that there is none.

        Returns:
            The tree of zeros that was sent; ``None`` before the first message of a stream, where
            none has to be.
        """
        known = self._sent.get((stream, dst))
        if known is None:
            self._sends += self._group.isend_tensor_dict({"structure": None}, dst)
            return None
        device = self._group.device
        zeros = [torch.zeros(shape, dtype=d, device=device) for shape, d in tensor_specs(known)]
        value = rebuild(known, iter(zeros))
        self.send(stream, value, dst, self.status(1))
        return value

    def status(self, value: int) -> Tensor:
        """What travels with each tree: zero, or not where a stage has failed."""
        return torch.full((1,), value, dtype=torch.uint8, device=self._group.device)

    def expect(self, stream: str, src: int, *, reuse: bool) -> Arrival:
        """Start receiving a tree.

        Args:
            stream: The stream.
            src: Group rank.
            reuse: Whether its tensors may be those of an earlier one that was released.
        """
        key = stream, src
        if key not in self._incoming:
            self._incoming[key] = _Incoming(self._group, self._name + stream, src)
        return self._incoming[key].expect(reuse=reuse)

    def finish(self) -> None:
        """Wait for everything that was sent."""
        self.finish_older()
        self.finish_older()  # what is new is older now

    def finish_older(self) -> None:
        """Wait for what was sent before the last call of this."""
        older, self._older, self._sends = self._older, self._sends, []
        wait_all(older)


class Sent:
    """A tree under way, of which received tensors may be a part."""

    def __init__(self, tensors: Sequence[Tensor], works: Sequence[PendingWork]) -> None:
        self._places = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._works = works

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether one of these is a part of it."""
        return any(tensor.untyped_storage().data_ptr() in self._places for tensor in tensors)

    def wait(self) -> None:
        """Return when its tensors may change."""
        wait_all(self._works)


class _Slot:
    """Tensors to receive into, again and again."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] | None = None
        self.is_taken = False
        self.sent: Sent | None = None


class _Incoming:
    """A stream from one rank."""

    def __init__(self, group: GroupCoordinator, name: str, src: int) -> None:
        self._group, self._name, self._src = group, name, src
        self.structure: Plain = None
        self._slots = [_Slot() for _ in range(_SLOTS)]

    def expect(self, *, reuse: bool) -> Arrival:
        if self.structure is None:
            header, works, _ = self._group.irecv_tensor_dict(self._src)
            wait_all(works)
            self.structure = header["structure"]
        if self.structure is None:
            return Arrival(None, {}, [], None)
        slot = self._free_slot() if reuse else None
        buffers = None if slot is None else slot.tensors
        tensors, works = self._group.irecv_registered(self._name, self._src, buffers)
        if slot is not None:
            slot.tensors = tensors
        return Arrival(self.structure, tensors, works, slot)

    def _free_slot(self) -> _Slot | None:
        """One that nothing reads any more; ``None`` if there is none."""
        for slot in self._slots:
            if not slot.is_taken:
                if slot.sent is not None:  # handed on as it came
                    slot.sent.wait()
                slot.is_taken, slot.sent = True, None
                return slot
        return None


class Arrival:
    """A tree that is being received."""

    def __init__(
        self,
        structure: Plain,
        tensors: dict[str, Tensor],
        works: Sequence[PendingWork],
        slot: _Slot | None,
    ) -> None:
        self._structure = structure
        self._tensors = list(tensors.values())[:-1]
        self._works = works
        self._slot = slot
        self.status = tensors.get(_STATUS)
        """Zero, or not where a stage before failed, in one element; ``None``: there is nothing."""

    def wait(self) -> bool:
        """Wait for it.

        Returns:
            Whether there is a tree; where its status is on a device, as far as that is known
            without waiting for that device.
        """
        wait_all(self._works)
        status = self.status
        return status is not None and not (status.device.type == "cpu" and bool(status))

    def value(self) -> Any:
        """The tree."""
        return rebuild(self._structure, iter(self._tensors))

    def release(self, sent: Sent | None) -> None:
        """Nothing will read the tree's tensors any more.

        Args:
            sent: What was made of it, which may hold some of them.
        """
        slot, self._slot = self._slot, None
        if slot is not None:
            slot.sent = sent if sent is not None and sent.holds(self._tensors) else None
            slot.is_taken = False


def _text(plain: Plain) -> str:
    specs = ", ".join(
        f"{str(dtype).removeprefix('torch.')} {shape}" for shape, dtype in tensor_specs(plain)
    )
    return f"[{specs or 'no tensor'}] in {_outline(plain)}"


def _outline(plain: Plain) -> str:
    """Structure in words, without shapes."""
    kind, *rest = plain
    if kind in ("tensor", "is"):
        return kind if kind == "tensor" else repr(rest[0])
    if kind in ("tuple", "list"):
        return f"{kind}({', '.join(map(_outline, rest[0]))})"
    return f"{kind}({', '.join(f'{key}: {_outline(item)}' for key, item in rest[1])})"
