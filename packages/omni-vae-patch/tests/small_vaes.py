"""A small autoencoder of torch's modules alone, and what tests on several ranks share."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from omni_group_coordinator import GroupCoordinator
from omni_parallel_state import ParallelLayout, ParallelState
from omni_vae_patch.spatial.partition import Partition
from omni_vae_patch.spatial.region import Region
from omni_vae_patch.spatial.rules import Undo
from omni_vae_patch.spatial.shard import SpatialShard


class SmallVae(nn.Module):
    """Samples are twice as fine as latents.

    Args:
        extra: Stands in the decoder as ``decoder.3``, after the first norm and its activation.
        padding_mode: Of its convolutions.
    """

    def __init__(self, extra: nn.Module | None = None, padding_mode: str = "zeros") -> None:
        super().__init__()
        self.config = SimpleNamespace(latent_channels=4)
        more: Any = {"padding": 1, "padding_mode": padding_mode}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.encoder = nn.Sequential(
                nn.Conv2d(3, 8, 3, **more), nn.SiLU(), nn.Conv2d(8, 4, 3, stride=2, **more)
            )
            self.decoder = nn.Sequential(
                nn.Conv2d(4, 8, 3, **more),
                nn.GroupNorm(2, 8),
                nn.SiLU(),
                extra or nn.Identity(),
                nn.Upsample(scale_factor=2),
                nn.Conv2d(8, 3, 3, **more),
            )
        self.requires_grad_(False).eval()

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class LessItsMean(nn.Module):
    """Mixes all positions, in its own forward and by no module."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((-2, -1), keepdim=True)


def state_of(vae: nn.Module) -> dict[str, Any]:
    """What of an autoencoder must be as it was."""
    return {name: (type(one), set(vars(one))) for name, one in vae.named_modules()}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values whose mean and size change along height and width, the same on every rank."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    down = torch.linspace(-1, 1, shape[-2])[:, None]
    return (values * (1 + 0.4 * down) + torch.linspace(-0.6, 0.6, shape[-1]) + down).to(dtype)


def everyone() -> GroupCoordinator:
    """The group of all ranks."""
    ranks = dist.get_world_size()
    return ParallelState(ParallelLayout(dp=ranks, vae=ranks)).vae


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value; infinite for other shapes."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    scale = expected.abs().max().clamp_min(1e-30)
    return float(((found - expected).abs().max() / scale).nan_to_num(nan=float("inf")))


def text_of(call: Callable[[], object]) -> str:
    """What a call raises, as text."""
    try:
        call()
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return "none"


Rule = Callable[[str, Any, Region], Undo]


def on_shards(
    group: GroupCoordinator,
    module: nn.Module,
    rule: Rule,
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    rows: Partition,
) -> Tensor | None:
    """What a module gives for this rank's part of a feature map; ``None`` for one without rows.

    Args:
        group: The ranks.
        module: To which the rule is applied meanwhile.
        rule: Of the module.
        call: What is called with the part.
        x: The whole, of which the partition's rows may be several times as coarse.
        rows: Of each rank.
    """
    region, me = Region(), group.rank_in_group
    factor = x.shape[rows.dim] // rows.total
    undo = rule("net.part", module, region)
    try:
        if not rows.rows[me]:
            return None
        with region.of(SpatialShard(group, rows)):
            return call(part_of(x, rows, me, factor))
    finally:
        undo()


def part_of(x: Tensor, rows: Partition, rank: int, factor: int) -> Tensor:
    """A rank's part of a whole that is so many times as fine as the rows."""
    return x.narrow(rows.dim, rows.start(rank) * factor, rows.rows[rank] * factor)
