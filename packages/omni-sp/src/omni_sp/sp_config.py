"""How the attention of a split sequence is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state import ParallelState, get_parallel_state
from omni_sp.kernels import AttentionKernel
from omni_sp.shards import Order

KVExchange = Literal["ring", "allgather", "auto"]
"""What ``ring_degree`` ranks do with keys and values."""


class _Place(NamedTuple):
    rank: int
    world_size: int
    device: torch.device


@dataclass(frozen=True)
class SequenceParallelConfig:
    """How the attention of a split sequence is computed.

    ``ulysses_degree`` × ``ring_degree`` ranks split the sequence, 1 × 1 being the identity.

    Raises:
        ParallelConfigError: A degree below 1, or an unknown ``kv_exchange`` or ``order``.
    """

    ulysses_degree: int = 1
    """Ranks that exchange sequence shards for head shards; 1: none."""
    ring_degree: int = 1
    """Ranks that share keys and values as ``kv_exchange`` says; 1: none."""
    convert_to_fp32: bool = True
    """Merge the partial results of Ring attention in float32, whatever the model's dtype."""
    kv_exchange: KVExchange = "ring"
    """``"ring"``: keys and values go round the ring block by block, while the block before is
    computed; a rank never holds more than two blocks. ``"allgather"``: one all-gather, then one
    kernel call; exact to the bit, and a rank holds all keys and values. ``"auto"``: for each call
    whatever sends least: Ulysses over all ranks, AllGather-KV over all ranks, or the two
    together with the degrees given."""
    order: Order = "contiguous"
    """``"zigzag"`` deals tokens out so that causal attention gives every rank as much to do."""
    kernel: AttentionKernel | None = None
    """Computes attention on a rank; ``None``: what the model uses itself."""
    _place: list[_Place] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("ulysses_degree", "ring_degree"):
            degree = getattr(self, name)
            if type(degree) is not int or degree < 1:
                msg = f"{name}={degree!r}; a degree is a whole number, 1 or more"
                raise ParallelConfigError(msg)
        for name, choices in (("kv_exchange", get_args(KVExchange)), ("order", get_args(Order))):
            if getattr(self, name) not in choices:
                msg = f"{name}={getattr(self, name)!r}; legal: {', '.join(map(repr, choices))}"
                raise ParallelConfigError(msg)
        if self.kernel is not None and not isinstance(self.kernel, AttentionKernel):
            msg = (
                f"kernel={self.kernel!r} lacks attend or attend_with_lse; see "
                "omni_sp.AttentionKernel"
            )
            raise ParallelConfigError(msg)

    @property
    def sequence_parallel_size(self) -> int:
        """Ranks over which the sequence is split."""
        return self.ulysses_degree * self.ring_degree

    def check_degrees(self, state: ParallelState) -> None:
        """Check that a state has groups for these degrees.

        Raises:
            ParallelConfigError: Its degrees are others.
        """
        asked = (self.ulysses_degree, self.ring_degree)
        layout = (state.layout.ulysses, state.layout.ring)
        if asked != layout:
            msg = (
                f"ulysses_degree={asked[0]}, ring_degree={asked[1]}, but the parallel state was "
                f"made with ulysses={layout[0]}, ring={layout[1]}; both must say the same"
            )
            raise ParallelConfigError(msg)

    # -- where this process stands ---------------------------------------------------------

    def setup(self, rank: int, world_size: int, device: torch.device) -> None:
        """Tell where this process stands among the ranks of its sequence.

        Nothing here needs it: without it, the methods below read the current state.

        Args:
            rank: Rank in the sequence-parallel group.
            world_size: Number of its ranks.
            device: Device of this rank.

        Raises:
            ParallelConfigError: Another number of ranks than the degrees make, or no such rank.
        """
        size = self.sequence_parallel_size
        if world_size != size or not 0 <= rank < size:
            msg = (
                f"setup(rank={rank}, world_size={world_size}) of a configuration with "
                f"ulysses_degree={self.ulysses_degree}, ring_degree={self.ring_degree}; legal: "
                f"world_size={size} and a rank of 0 to {size - 1}"
            )
            raise ParallelConfigError(msg)
        self._place[:] = [_Place(rank, world_size, torch.device(device))]

    def is_initialized(self) -> bool:
        """Whether `setup` was called."""
        return bool(self._place)

    def get_rank(self) -> int:
        """Rank in the sequence-parallel group.

        Raises:
            RuntimeError: `setup` was not called and no state is current.
        """
        return self._place[0].rank if self._place else get_parallel_state().sp.rank_in_group

    def get_world_size(self) -> int:
        """Ranks of the sequence-parallel group; raises as `get_rank`."""
        return self._place[0].world_size if self._place else get_parallel_state().sp.world_size

    def get_ulysses_rank(self) -> int:
        """Rank in the Ulysses group; raises as `get_rank`."""
        return self.get_rank() % self.ulysses_degree

    def get_ulysses_world_size(self) -> int:
        """Ranks of the Ulysses group."""
        return self.ulysses_degree

    def get_ring_rank(self) -> int:
        """Rank in the Ring group; raises as `get_rank`."""
        return self.get_rank() // self.ulysses_degree

    def get_ring_world_size(self) -> int:
        """Ranks of the Ring group."""
        return self.ring_degree
