"""The contestants of sequence parallelism: this repository's modes, and diffusers' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import nn

from omni_parallel_state import Handle, ParallelLayout, ParallelState

Side = Literal["omni-sp", "diffusers"]


class Competitor(Protocol):
    """What every contestant has, of whatever benchmark."""

    @property
    def side(self) -> str:
        """Whose it is."""

    @property
    def mode(self) -> str:
        """What ``--modes`` calls it."""


class Named:
    """Has a name in tables: whose it is, and what ``--modes`` calls it."""

    side: str
    mode: str

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"{self.side} {self.mode}"


CompetitorT = TypeVar("CompetitorT", bound=Competitor)


@dataclass(frozen=True)
class Contestant(Named):
    """One way to split a model's sequence over the ranks."""

    side: Side
    mode: str
    """What ``--modes`` calls it."""
    ulysses: int = 1
    ring: int = 1
    kv_exchange: str = "ring"

    def apply(self, model: nn.Module, device: torch.device | str = "cpu") -> Callable[[], None]:
        """Make a model parallel in place, on every rank.

        Returns:
            Takes back what the contestant made, as far as it can.
        """
        if self.side == "diffusers":
            return self._apply_diffusers(model)
        return self._apply_omni(model, device)

    def _apply_omni(self, model: nn.Module, device: torch.device | str) -> Callable[[], None]:
        from omni_sp import SequenceParallelConfig, apply_sequence_parallel

        options: dict[str, Any] = {"ulysses_degree": self.ulysses, "ring_degree": self.ring}
        if self.ring > 1:
            options["kv_exchange"] = self.kv_exchange
        config = SequenceParallelConfig(**options)
        layout = ParallelLayout(ulysses=self.ulysses, ring=self.ring)
        return applied(
            layout, device, lambda state: apply_sequence_parallel(model, config, state=state)
        )

    def _apply_diffusers(self, model: Any) -> Callable[[], None]:
        from diffusers import ContextParallelConfig

        config = ContextParallelConfig(ulysses_degree=self.ulysses, ring_degree=self.ring)
        model.enable_parallelism(config=config)
        return lambda: None  # diffusers has no way back


def applied(
    layout: ParallelLayout,
    device: torch.device | str,
    apply: Callable[[ParallelState], Handle],
) -> Callable[[], None]:
    """Apply a strategy with a state of its own; returns what undoes it and destroys the state."""
    state = ParallelState(layout, device)
    try:
        handle = apply(state)
    except BaseException:
        state.destroy()
        raise

    def undo() -> None:
        handle.remove()
        state.destroy()

    return undo


def contestants(ranks: int) -> list[Contestant]:
    """Every contestant for a number of ranks."""
    found = [
        Contestant("omni-sp", "ulysses", ulysses=ranks),
        Contestant("omni-sp", "ring", ring=ranks),
        Contestant("omni-sp", "allgather", ring=ranks, kv_exchange="allgather"),
        Contestant("diffusers", "ulysses", ulysses=ranks),
        Contestant("diffusers", "ring", ring=ranks),
    ]
    if ranks % 2 == 0 and ranks > 2:
        half = ranks // 2
        found[3:3] = [
            Contestant("omni-sp", f"u{half}-ring2", half, 2),
            Contestant("omni-sp", f"u{half}-allgather2", half, 2, "allgather"),
        ]
        found.append(Contestant("diffusers", f"u{half}-ring2", half, 2))
    return found


def chosen(ranks: int, modes: tuple[str, ...]) -> list[Contestant]:
    """The contestants that some modes name.

    Raises:
        ValueError: A name is nobody's; lists the legal ones.
    """
    return pick(contestants(ranks), modes, ranks)


def pick(everyone: Sequence[CompetitorT], modes: tuple[str, ...], ranks: int) -> list[CompetitorT]:
    """Those that some modes name: by mode for every side, or ``side:mode`` for one; or all.

    Raises:
        ValueError: A name is nobody's; lists the legal ones.
    """
    if not modes:
        return list(everyone)
    legal = {c.mode for c in everyone} | {f"{c.side}:{c.mode}" for c in everyone}
    if unknown := [mode for mode in modes if mode not in legal]:
        sides = [f"{side}:" for side in dict.fromkeys(c.side for c in everyone)]
        msg = (
            f"no contestant on {ranks} ranks is called {unknown[0]!r}; legal: "
            f"{', '.join(sorted({c.mode for c in everyone}))}, each also with "
            f"{', '.join(sides[:-1])} or {sides[-1]} in front"
        )
        raise ValueError(msg)
    return [c for c in everyone if c.mode in modes or f"{c.side}:{c.mode}" in modes]
