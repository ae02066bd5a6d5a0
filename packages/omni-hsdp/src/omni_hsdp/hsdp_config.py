"""How weights are sharded, and its checks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state.checkpoints.dtypes import PLAIN_DTYPES

REST = -1
"""A shard size that is left open."""


@dataclass
class HSDPInferenceConfig:
    """Configuration of `apply_hsdp_to_model` and `load_hsdp_model`."""

    enabled: bool = False
    """Must be True where the configuration is used."""

    hsdp_replicate_size: int = 1
    """How many sharded copies of the weights there are."""

    hsdp_shard_size: int = -1
    """Ranks that share one copy; -1 takes what the layout has, as ``fs`` and ``replicate``; if it
    has none, the world over the replicate size."""

    param_dtype: torch.dtype | None = torch.bfloat16
    """What weights are cast to when they are gathered. Nothing is cast in a model that has this
    dtype in any of its weights, for its others are there on purpose, nor in one with fp8 weights;
    modules that the model's class keeps in float32 stay so. A model that is cast wants inputs of
    this dtype, as if it had been loaded in it. None: never cast."""

    reduce_dtype: torch.dtype | None = torch.float32
    """For gradients, of which inference has none: without effect."""

    output_dtype: torch.dtype | None = None
    """What floating-point outputs of the model are cast to; None leaves them."""

    reshard_after_forward: bool = True
    """Whether a block's weights are given up after its forward; else they stay until
    `release`. A gather policy, where one is given, has the last word."""


def check_config(config: HSDPInferenceConfig) -> None:
    """Check what can be told from the configuration alone.

    Raises:
        ParallelConfigError: Not enabled, impossible sizes, or dtypes that nothing can be cast to.
    """
    if not config.enabled:
        msg = (
            "this HSDPInferenceConfig is not enabled; pass HSDPInferenceConfig(enabled=True), or "
            "leave the model as it is"
        )
        raise ParallelConfigError(msg)
    for name, lowest in (("hsdp_replicate_size", 1), ("hsdp_shard_size", REST)):
        size = getattr(config, name)
        if type(size) is not int or size < lowest or size == 0:
            rest = " or -1 for the rest of the world" if lowest < 0 else ""
            msg = f"{name}={size!r} is no number of ranks; legal: 1 and above{rest}"
            raise ParallelConfigError(msg)
    for name, legal in (
        ("param_dtype", PLAIN_DTYPES),
        ("output_dtype", PLAIN_DTYPES),
    ):
        dtype = getattr(config, name)
        if dtype is not None and dtype not in legal:
            names = ", ".join(map(str, legal))
            msg = f"{name}={dtype!r}: weights cannot be cast to it; legal: {names}, or None"
            raise ParallelConfigError(msg)


def resolve_sizes(config: HSDPInferenceConfig, ranks: int) -> tuple[int, int]:
    """The replicate and shard sizes over a number of ranks.

    Raises:
        ParallelConfigError: They do not multiply to it; names those that do.
    """
    replicate, shard = config.hsdp_replicate_size, config.hsdp_shard_size
    if shard == REST and ranks % replicate == 0:
        return replicate, ranks // replicate
    if replicate * shard != ranks:
        legal = ", ".join(f"{n} × {ranks // n}" for n in range(1, ranks + 1) if ranks % n == 0)
        msg = (
            f"hsdp_replicate_size={replicate} × hsdp_shard_size={shard} does not give the "
            f"{ranks} ranks there are; legal here (replicate × shard): {legal}"
        )
        raise ParallelConfigError(msg)
    return replicate, shard
