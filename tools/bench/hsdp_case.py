"""The cases of the benchmark of sharded weights, and what each rank does in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.harness import Progress, process_group
from bench.hsdp_contestants import ShardingContestant, load_whole
from bench.hsdp_memory import Baseline, Watch, return_what_is_freed
from bench.hsdp_results import PLAIN, Memory, Peaks, ShardedMeasured, ShardedResult
from bench.models import build, inputs
from bench.race import from_all_ranks
from bench.ready import Ready, make_ready, race_all

WARM_UP: Final = 2
"""Forwards by each contestant before it is timed: the first tells it the order of the blocks."""
FILE_SIZE: Final = "50MB"
"""Of the files of a checkpoint, as diffusers splits it."""
_TINY_LAYERS: Final = 3


@dataclass(frozen=True)
class ShardedCase:
    """One row of the benchmark.

    Attributes:
        family: Of `bench.models.FAMILIES`.
        tokens: In attention.
        layers: Attention layers.
        head_dim: Size of a head; heads are as many as ever.
    """

    family: str
    tokens: int
    layers: int
    head_dim: int = 64

    @property
    def name(self) -> str:
        """What ``--rows`` calls it."""
        return f"{self.family}-{self.tokens}"

    @property
    def title(self) -> str:
        """What tables call it."""
        return f"{self.family} {self.tokens} tokens, {self.layers} layers"

    def build(self) -> nn.Module:
        """The model, with random weights, the same ones in every process."""
        return build(self.family, self.layers, head_dim=self.head_dim)

    def run(self, model: nn.Module) -> Tensor:
        """The output of a forward."""
        output: Tensor = model(**inputs(self.family, self.tokens))[0]
        return output


CASES: Final = {
    case.name: case for case in (ShardedCase("flux", 512, 18), ShardedCase("qwen", 512, 12))
}
QUICK_CASES: Final = {case.name: case for case in (ShardedCase("flux", 64, 6),)}


def write_checkpoint(_: Progress, case: ShardedCase, folder: str) -> None:
    """Write the model of a case as diffusers does, in several files; one rank does so."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    case.build().save_pretrained(folder, max_shard_size=FILE_SIZE)  # type: ignore[operator]


def _prepared(case: ShardedCase, folder: str) -> Any:
    """What no measurement is to count: imports, and what is started once. Gives the class."""
    from diffusers.utils import logging

    import omni_hsdp  # noqa: F401 - so that it is no part of a measurement

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return_what_is_freed()
    tiny = replace(case, layers=_TINY_LAYERS).build()
    case.run(tiny)
    return type(tiny)


@torch.no_grad()
def memory_case(
    progress: Progress, case: ShardedCase, contestant: ShardingContestant, folder: str
) -> Memory:
    """Load and run one contestant in a fresh process; every rank calls it."""
    with process_group():
        cls = _prepared(case, folder)
        dist.all_reduce(torch.zeros(2**20))  # buffers of the connections
        baseline = Baseline()
        with ExitStack() as stack:
            dist.barrier()
            with Watch(baseline) as loading:
                model = stack.enter_context(contestant.loaded(cls, folder, dist.get_world_size()))
                dist.barrier()
            with Watch(baseline) as running, contestant.requested(model):
                for _ in range(WARM_UP + 1):
                    case.run(model)
                dist.barrier()
        progress.step()
        return Memory(_most(loading.peaks()), _most(running.peaks()))


def _most(peaks: Peaks) -> Peaks:
    """Of all ranks."""
    everyone = from_all_ranks(peaks)
    return Peaks(max(p.anonymous for p in everyone), max(p.resident for p in everyone))


@torch.no_grad()
def race_case(
    progress: Progress,
    case: ShardedCase,
    contestants: Sequence[ShardingContestant],
    rounds: int,
    folder: str,
    memory: dict[str, Memory],
) -> ShardedResult:
    """Race the contestants; every rank calls it.

    Args:
        progress: Counts steps.
        case: The row.
        contestants: Those that take part.
        rounds: How often each takes its turn.
        folder: Of the checkpoint.
        memory: What was measured of each, by name.
    """
    with process_group():
        cls = _prepared(case, folder)
        whole = load_whole(cls, folder)

        def single() -> Tensor:
            return case.run(whole)

        reference, ranks = single(), dist.get_world_size()
        progress.step(2)
        ready = []
        for contestant in contestants:
            one = _ready(case, contestant, cls, folder, reference)
            found = ShardedMeasured(**vars(one.measured) | {"memory": memory.get(contestant.name)})
            ready.append(replace(one, measured=found))
            progress.step()
        raced = race_all(single, ready, rounds, progress.step)
    model, block = _sizes(whole)
    return ShardedResult(
        case=case.title,
        ranks=ranks,
        rival=PLAIN,
        single=raced.single,
        together=raced.together,
        measured=raced.measured,
        core_share=raced.core_share,
        baseline="whole, one rank alone",
        counted="forward",
        model=model,
        block=block,
    )


def _sizes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the weights, and of the largest block."""
    from omni_hsdp import find_blocks

    def size(module: nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters())

    return size(model), max(size(block) for _, block in find_blocks(model))


def _ready(
    case: ShardedCase,
    contestant: ShardingContestant,
    cls: Any,
    folder: str,
    reference: Tensor,
) -> Ready:
    stack = ExitStack()
    models: list[nn.Module] = []

    def apply() -> Callable[[], None]:
        model = stack.enter_context(contestant.loaded(cls, folder, dist.get_world_size()))
        stack.enter_context(contestant.requested(model))
        models.append(model)
        return stack.close

    return make_ready(
        ShardedMeasured(contestant.name, contestant.side, mode=contestant.mode),
        apply,
        lambda: (lambda: case.run(models[0]), None),
        reference,
        warm_up=WARM_UP,
    )
