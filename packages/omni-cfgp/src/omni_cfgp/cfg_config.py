"""How guidance branches are divided over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state.denoising.requests import Seeds

Division = Literal["auto", "branches", "rows"]
"""What one rank computes: a call of the denoiser for one branch, or rows of a batch of branches."""


@dataclass(frozen=True)
class CFGParallelConfig:
    """Configuration of `apply_cfg_parallel`.

    Raises:
        ParallelConfigError: A value is not among the legal ones.
    """

    division: Division = "auto"
    """``"branches"``: each call of the denoiser is made on one rank. ``"rows"``: the rows of each
    call's batch are divided. ``"auto"``: rows where a step makes one call of several rows, as
    pipelines do that double their latents; branches elsewhere."""

    seeds: Seeds = "broadcast"
    """``"broadcast"``: every rank takes the random state and the given latents of the first one
    when a pipeline is called. ``"error"``: ranks that differ raise."""

    shared_inputs: tuple[str, ...] = ()
    """Parameters of the denoiser that are no part of its batch, whatever their shape: beside the
    known ones, such as rotary embeddings. Of use with rows only."""

    denoisers: tuple[str, ...] = ()
    """Components of the pipeline that predict noise; default: those of the usual names."""

    def __post_init__(self) -> None:
        for name, value, legal in (
            ("division", self.division, get_args(Division)),
            ("seeds", self.seeds, get_args(Seeds)),
        ):
            if value not in legal:
                msg = f"{name}={value!r}; legal: {', '.join(map(repr, legal))}"
                raise ParallelConfigError(msg)
