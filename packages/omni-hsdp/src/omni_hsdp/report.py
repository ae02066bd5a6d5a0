"""What sharding a model saves, and what it leaves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from omni_hsdp.gather_policy import peak_bytes
from omni_hsdp.ignored import WholeParameter
from omni_hsdp.sharded_model import record_of

_MEGA = 1e6


@dataclass(frozen=True)
class HSDPReport:
    """Bytes of a sharded model; ``str()`` of it is a table for people.

    Attributes:
        replicate: How many sharded copies there are.
        shard: Ranks that share a copy.
        total: Parameters of the model as it was, each counted once.
        per_rank: Parameters that each rank of a copy holds, whole ones included.
        gathered_peak: The most that a forward has gathered at once, beside what a rank holds.
        blocks: What is gathered for each block, by name; ``""`` for what is in none.
        whole: Parameters that are not sharded, and why.
    """

    replicate: int
    shard: int
    total: int
    per_rank: tuple[int, ...]
    gathered_peak: int
    blocks: dict[str, int]
    whole: tuple[WholeParameter, ...]

    def __str__(self) -> str:
        saved = 1 - max(self.per_rank) / max(self.total, 1)
        copies = f", {self.replicate} times" if self.replicate > 1 else ""
        lines = [
            f"{self.total / _MEGA:.1f} MB in {len(self.blocks) - 1} blocks, shared by "
            f"{self.shard} ranks{copies}",
            f"held per rank    {max(self.per_rank) / _MEGA:>12.1f} MB ({saved:.0%} saved)",
            f"gathered at most {self.gathered_peak / _MEGA:>12.1f} MB",
            f"left whole       {sum(p.bytes for p in self.whole) / _MEGA:>12.1f} MB",
        ]
        return "\n".join(lines + [f"  {p.name}: {p.bytes} bytes, {p.reason}" for p in self.whole])


def hsdp_report(model: nn.Module) -> HSDPReport:
    """What each rank holds of a sharded model. Communicates nothing.

    Raises:
        ParallelConfigError: The model is not sharded.
    """
    record = record_of(model)
    whole = sum(parameter.bytes for parameter in record.whole)
    root, blocks = record.gathered_bytes()
    if record.shard == 1:
        total = sum(p.numel() * p.element_size() for p in model.parameters())
        sizes = (record.replicate, 1, total, (total,), 0)
        return HSDPReport(*sizes, {"": root, **blocks}, tuple(record.whole))
    per_rank = []
    for rank in range(record.shard):
        parts = ((p, p.rows(rank, record.shard)) for p in record.parameters)
        per_rank.append(whole + sum(p.bytes(rows.stop - rows.start) for p, rows in parts))
    everything = root + sum(blocks.values())
    peak = peak_bytes(root, list(blocks.values()), record.policy.prefetch)
    return HSDPReport(
        replicate=record.replicate,
        shard=record.shard,
        total=whole + sum(parameter.bytes() for parameter in record.parameters),
        per_rank=tuple(per_rank),
        gathered_peak=max(everything, peak) if record.policy.keep == "all" else peak,
        blocks={"": root, **blocks},
        whole=tuple(record.whole),
    )
