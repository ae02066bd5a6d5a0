"""How a model is cut into stages, and what keeps them busy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state.denoising.requests import Seeds

Balance = Literal["cost", "count"]
"""Stages of equal cost, which is computed from the parameters, or of equally many blocks."""


@dataclass(frozen=True)
class PipelineParallelConfig:
    """Configuration of `apply_pipeline_parallel`.

    Raises:
        ParallelConfigError: A value is not among the legal ones.
    """

    virtual_stages: int = 1
    """Chunks of blocks on each rank, which take turns around the ranks: of ``M`` micro-batches on
    ``S`` stages, ``v`` chunks on each, a step takes ``(M + (S - 1) / v) / (S * M)`` of one rank's
    time. Every chunk more costs one more exchange, and the embedders once more."""

    micro_batches: int | Literal["auto"] = "auto"
    """Into how many parts the rows of one call's batch are cut, at most. ``"auto"``: as many as
    there are chunks in the pipeline. 1: calls stay whole."""

    balance: Balance | tuple[float, ...] = "cost"
    """``"cost"``, ``"count"``, or the cost of each block, in any unit."""

    points: tuple[int, ...] = ()
    """Where to cut: indices of the blocks that begin a chunk, but for the first; default: by
    `balance`."""

    block_lists: tuple[str, ...] = ()
    """Names of the model's lists of blocks, in order of execution; default: those that are known,
    or found."""

    release: bool = True
    """Whether a rank gives up the weights of other stages' blocks."""

    seeds: Seeds = "broadcast"
    """``"broadcast"``: every rank takes the random state and the given latents of the first one
    when a pipeline is called. ``"error"``: ranks that differ raise."""

    shared_inputs: tuple[str, ...] = ()
    """Parameters of the denoiser that are no part of its batch, whatever their shape: beside the
    known ones, such as rotary embeddings."""

    denoisers: tuple[str, ...] = ()
    """Components of the pipeline that are cut; default: those of the usual names."""

    def __post_init__(self) -> None:
        _check_count("virtual_stages", self.virtual_stages)
        if self.micro_batches != "auto":
            _check_count("micro_batches", self.micro_batches, "'auto' or ")
        if isinstance(self.balance, str):
            _check_choice("balance", self.balance, (*get_args(Balance),), " or a tuple of costs")
        else:
            _check_all("balance", self.balance, (int, float), "numbers, 'cost' or 'count'")
        _check_all("points", self.points, (int,), "whole numbers")
        for name in ("block_lists", "shared_inputs", "denoisers"):
            _check_all(name, getattr(self, name), (str,), "names")
        _check_choice("seeds", self.seeds, (*get_args(Seeds),))


def _check_count(name: str, value: object, others: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        msg = f"{name}={value!r}; legal: {others}a whole number from 1"
        raise ParallelConfigError(msg)


def _check_all(name: str, value: object, kinds: tuple[type, ...], legal: str) -> None:
    items = value if isinstance(value, tuple | list) else [None]
    if not all(isinstance(item, kinds) and not isinstance(item, bool) for item in items):
        msg = f"{name}={value!r}; legal: a tuple of {legal}"
        raise ParallelConfigError(msg)


def _check_choice(name: str, value: str, legal: Sequence[str], others: str = "") -> None:
    if value not in legal:
        msg = f"{name}={value!r}; legal: {', '.join(map(repr, legal))}{others}"
        raise ParallelConfigError(msg)
