"""Time, bytes and memory of a layout, by a stated model: arithmetic alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from omni_parallel.plan import sent_bytes as sent
from omni_parallel.plan.convolutions import halo_bytes
from omni_parallel.plan.machine import Machine
from omni_parallel.plan.memory import MemoryUse, memory_use
from omni_parallel.plan.recorded_call import Block
from omni_parallel.plan.stage_cut import cut
from omni_parallel.plan.workload import Workload
from omni_parallel.v1 import ParallelConfig
from omni_parallel_state import ParallelLayout

PATCHES = 2
WARM_UP = 1
"""Patches and exact steps of PipeFusion, where the configuration does not say others."""


@dataclass(frozen=True)
class Prediction:
    """What a layout is predicted to need."""

    config: ParallelConfig
    sent: dict[str, float]
    """Bytes that the busiest rank sends for one step, by strategy."""
    compute: float
    """Seconds that the slowest rank computes, or waits for stages before it, in a step."""
    link: float
    """Seconds of a step that links are busy, hidden or not."""
    step: float
    """Seconds of a step: computing, and of the links what it does not hide."""
    decode: float
    """Seconds of the autoencoder, once."""
    decode_sent: float
    """Bytes that the busiest rank sends for it."""
    memory: MemoryUse
    total: float
    """Seconds of an image or video: all steps, and decoding."""

    @property
    def step_bytes(self) -> float:
        """Bytes that the busiest rank sends for one step."""
        return sum(self.sent.values())


def predict(work: Workload, config: ParallelConfig, machine: Machine) -> Prediction:
    """What a legal layout needs, on such accelerators."""
    layout = config.layout(machine.ranks)
    stages = max(config.pp, config.pipefusion)
    blocks = work.denoiser.blocks
    runs = cut([block.weights for block in blocks], stages) if stages > 1 else [slice(None)]
    parts = [blocks[run] for run in runs]
    mine = ceil(work.branches / config.cfg)
    compute = _compute(work, config, machine, parts, mine)
    moved = _sent(work, config, parts, mine)
    shared = sum(_block_flops(work, block, config)[1] for block in max(parts, key=len))
    ring_hides = mine * machine.compute_seconds(shared, 0) * (config.ring - 1) / config.ring
    seconds = {
        name: machine.link_seconds(size, layout, _DIMS[name]) for name, size in moved.items()
    }
    seconds["stages"] = _first_messages(work, config, machine, layout, parts)
    hidden = {"ring": ring_hides, "weights": compute}
    if config.pipefusion > 1:
        hidden["stages"] = compute
    exposed = sum(max(0.0, took - hidden.get(name, 0.0)) for name, took in seconds.items())
    decode, decode_sent = _decode(work, config, machine, layout)
    step = compute + exposed
    return Prediction(
        config,
        moved,
        compute,
        sum(seconds.values()),
        step,
        decode,
        decode_sent,
        memory_use(work, config, parts, mine),
        work.steps * step + decode,
    )


_DIMS = {
    "ulysses": "ulysses",
    "ring": "ring",
    "tokens": "sp",
    "guidance": "cfg",
    "stages": "pp",
    "weights": "fs",
}


# -- computing -----------------------------------------------------------------------------------


def _block_flops(work: Workload, block: Block, config: ParallelConfig) -> tuple[float, float]:
    """What the slowest rank of a sequence computes: in all, and of it in shared attention."""
    ranks, length = config.ulysses * config.ring, work.sequence
    share = ceil(length / ranks) / length if length else 1 / ranks
    together = work.shared(block)
    apart = sum(one.flops for one in block.attended) - sum(one.flops for one in together)
    attention = 0.0
    for one in together:
        # PipeFusion shares the queries alone; else Ulysses gives a rank whole heads.
        by_heads = config.pipefusion == 1
        heads = ceil(one.heads / config.ulysses) / one.heads / config.ring
        attention += one.flops * (heads if by_heads else share)
    return (block.matmul_flops + apart) * share + attention, attention


def _compute(
    work: Workload,
    config: ParallelConfig,
    machine: Machine,
    parts: Sequence[Sequence[Block]],
    mine: int,
) -> float:
    rows, calls = (mine, 1) if work.batched and len(parts) == 1 else (1, mine)
    outer = work.denoiser.outside
    outside = outer.matmul_flops + sum(one.flops for one in outer.attended)
    flops = [sum(_block_flops(work, block, config)[0] for block in part) for part in parts]
    weights = [sum(block.weights for block in part) for part in parts]
    if len(parts) == 1:
        return calls * machine.compute_seconds(
            rows * (outside + flops[0]), weights[0] + outer.weights
        )
    always = calls * machine.compute_seconds(outside, outer.weights)
    stage = max(map(machine.compute_seconds, flops, weights))
    exact = always + (calls + len(parts) - 1) * stage
    if config.pipefusion == 1:
        return exact
    patches, warm_up = fused_options(config)
    patch = max(
        machine.compute_seconds(f / patches, w) for f, w in zip(flops, weights, strict=True)
    )
    in_flight = calls * patches
    fused = always + max(in_flight, len(parts)) * patch
    exact_steps = min(warm_up, work.steps)
    return (exact_steps * exact + (work.steps - exact_steps) * fused) / work.steps


def fused_options(config: ParallelConfig) -> tuple[int, int]:
    """Patches and exact steps of PipeFusion."""
    options = config.options_of("pipefusion")
    return options.get("patches", PATCHES), options.get("warmup_steps", WARM_UP)


# -- sending -------------------------------------------------------------------------------------


def _flows(config: ParallelConfig, parts: Sequence[Sequence[Block]]) -> list[float]:
    return [part[-1].output_bytes / (config.ulysses * config.ring) for part in parts[:-1]]


def _sent(
    work: Workload, config: ParallelConfig, parts: Sequence[Sequence[Block]], mine: int
) -> dict[str, float]:
    ulysses, ring = config.ulysses, config.ring
    if config.pipefusion > 1:  # whose ranks of a stage give each other keys, in one way
        ulysses, ring = 1, ulysses * ring
    outer = work.denoiser.outside
    most = max(parts, key=lambda part: sum(len(work.shared(block)) for block in part))
    attended = [one for block in (*most, outer) for one in work.shared(block)]
    exchanged, passed_on = sent.attention_bytes(attended, ulysses, ring)
    held = max(sum(block.weights for block in part) for part in parts) + outer.weights
    forwards = 1 if work.batched and len(parts) == 1 else mine
    found = {
        "ulysses": mine * exchanged,
        "ring": mine * passed_on,
        "tokens": mine * sent.joined_bytes(work.prediction_bytes, ulysses * ring),
        "guidance": sent.guidance_bytes(work, config.cfg),
        "stages": sent.stage_bytes(_flows(config, parts), mine, work.prediction_bytes),
        "weights": sent.gathered_bytes(held, config.hsdp, forwards),
    }
    return {name: size for name, size in found.items() if size}


def _first_messages(
    work: Workload,
    config: ParallelConfig,
    machine: Machine,
    layout: ParallelLayout,
    parts: Sequence[Sequence[Block]],
) -> float:
    """Seconds of the messages that no computing hides: the first ones, and the last result."""
    sizes = [*_flows(config, parts), *(work.prediction_bytes for _ in parts[1:])]
    return machine.link_seconds(sum(sizes), layout, "pp") if sizes else 0.0


def _decode(
    work: Workload, config: ParallelConfig, machine: Machine, layout: ParallelLayout
) -> tuple[float, float]:
    if work.decode is None:
        return 0.0, 0.0
    ranks = config.vae_patch
    halos = halo_bytes(work.decode.convolved, -2, ranks)
    size = halos + sent.joined_bytes(work.decode.output_bytes, ranks)
    weights = work.decode.outside.weights
    computing = machine.compute_seconds(
        work.decode.flops / ranks, weights, machine.decode_efficiency
    )
    return computing + machine.link_seconds(size, layout, "vae"), size
