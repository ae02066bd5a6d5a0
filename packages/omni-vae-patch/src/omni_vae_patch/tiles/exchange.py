"""Sending what each rank has computed to where it is wanted, in exact sizes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_group_coordinator import GroupCoordinator
from omni_vae_patch.agreement import Attempt, Plain, settle

_REMEMBERED = 4096


@dataclass(frozen=True)
class Piece:
    """One tensor that a rank computes."""

    owner: int
    """Group rank."""
    key: str
    """Pieces of one key have one shape; the same text on every rank."""


@dataclass(frozen=True)
class TileSpec:
    """What a receiver must know: the buffer gets the sender's strides as well.

    A convolution may take another path for another order of dimensions in memory, so what
    follows on received tiles is bit-equal only with the order that the network gave them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]
    """Dimensions from the slowest to the fastest in memory."""

    @classmethod
    def of(cls, tensor: Tensor) -> TileSpec:
        """The spec of a tensor."""
        strides = tensor.stride()
        order = sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], dim))
        return cls(tuple(tensor.shape), tensor.dtype, tuple(order))

    def plain(self) -> Plain:
        """As plain data."""
        return (self.shape, self.dtype, self.order)

    def payload(self, tensor: Tensor) -> Tensor:
        """The tensor in the order of its memory."""
        return tensor.permute(self.order).contiguous()

    def buffer(self, device: torch.device) -> Tensor:
        """A contiguous buffer for the payload."""
        shape = [self.shape[dim] for dim in self.order]
        return torch.empty(shape, dtype=self.dtype, device=device)

    def unfold(self, payload: Tensor) -> Tensor:
        """The tensor that a payload is of."""
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return payload.permute(back)


class TileExchange:
    """Point-to-point messages of exactly the tiles' sizes, on one group.

    What the tiles of a key look like is told with the first exchange that has them and remembered;
    after that no sizes travel. A rank whose tile has changed its shape says so beforehand.
    """

    def __init__(self, group: GroupCoordinator) -> None:
        self.group = group
        self._known: dict[str, TileSpec] = {}

    def deliver(
        self,
        what: str,
        pieces: Sequence[Piece],
        mine: Attempt,
        destinations: Collection[int],
        device: torch.device,
    ) -> dict[int, Tensor]:
        """Bring the pieces to the destinations.

        Args:
            what: For messages: what was computed.
            pieces: The same on every rank.
            mine: A dict of this rank's tensors by index, or the error that it met.
            destinations: Group ranks that want all pieces.
            device: Where received pieces land.

        Returns:
            All pieces by index on the destinations, this rank's own elsewhere.

        Raises:
            Exception: As of `settle`.
        """
        own: Mapping[int, Tensor] = mine.value if mine.error is None else {}
        specs = {index: TileSpec.of(tensor) for index, tensor in own.items()}
        self._learn(what, pieces, mine, specs)
        found = self._move(pieces, own, destinations, device)
        return dict(own) | found

    def _learn(
        self, what: str, pieces: Sequence[Piece], mine: Attempt, specs: Mapping[int, TileSpec]
    ) -> None:
        asks = any(piece.key not in self._known for piece in pieces) or any(
            self._known[pieces[index].key] != spec for index, spec in specs.items()
        )
        note = {index: spec.plain() for index, spec in specs.items()}
        plan = f"{len(pieces)} tiles, " + ", ".join(f"{p.key} on {p.owner}" for p in pieces)
        notes = settle(self.group, what, mine, note, asks=asks, plan=plan)
        if notes is None:
            return
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        for said in notes:
            for index, spec in said.items():
                self._known[pieces[index].key] = TileSpec(*spec)

    def _move(
        self,
        pieces: Sequence[Piece],
        own: Mapping[int, Tensor],
        destinations: Collection[int],
        device: torch.device,
    ) -> dict[int, Tensor]:
        checked, me = self.group.checked, self.group.rank_in_group
        if checked is None:
            return {}
        specs = [self._known[piece.key] for piece in pieces]
        sends = [
            (payload, rank)
            for index, tensor in own.items()
            for payload in (specs[index].payload(tensor),)
            for rank in destinations
            if rank != me
        ]
        wanted = [i for i, p in enumerate(pieces) if me in destinations and p.owner != me]
        buffers = {index: specs[index].buffer(device) for index in wanted}
        receives = [(buffer, pieces[index].owner) for index, buffer in buffers.items()]
        for work in checked.iexchange(sends, receives, "tiles"):
            work.wait()
        return {index: specs[index].unfold(buffer) for index, buffer in buffers.items()}
