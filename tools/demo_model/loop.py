"""Runs the steps of a training phase: reproducible, interruptible, resumable."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol, TextIO

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

SEED: Final = 20240617
SAVE_EVERY_SECONDS: Final = 60.0
REPORT_EVERY: Final = 50


class Stateful(Protocol):
    """Anything that can be saved and restored: a module, an optimiser, an average."""

    def state_dict(self) -> Any:
        """Return the state to save."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Restore a saved state."""


class Optimiser(Protocol):
    """What `optimiser_step` needs of an optimiser of torch."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the groups, whose learning rate is set before each step."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""

    def step(self) -> Any:
        """Apply the gradients."""


class Average:
    """Exponential moving average of a module's parameters; what is shipped is the average."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Start at the present parameters of `module`."""
        self._module = module
        self._decay = decay
        self._values = {name: p.detach().clone() for name, p in module.named_parameters()}

    def update(self, step: int) -> None:
        """Move the average; early steps count for more, so that it forgets the initial weights."""
        decay = min(self._decay, (1 + step) / (10 + step))
        names = list(self._values)
        now = dict(self._module.named_parameters())
        torch._foreach_lerp_(
            [self._values[name] for name in names],
            [now[name].detach() for name in names],
            1 - decay,
        )

    def copy_to(self, module: nn.Module) -> None:
        """Write the average into a module of the same structure."""
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(self._values[name])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the averaged values."""
        return self._values

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Restore the averaged values."""
        self._values = {name: value.clone() for name, value in state_dict.items()}


def seed_step(step: int) -> int:
    """Seed torch for one step, so that a resumed run sees what an unbroken one would have seen."""
    seed = SEED + 1_000_003 * (step + 1)
    torch.manual_seed(seed)
    return seed


def learning_rate(step: int, steps: int, *, peak: float, warm_up: int) -> float:
    """Rise linearly over `warm_up` steps, then fall along a cosine to a hundredth of `peak`."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    share = min(1.0, (step - warm_up) / max(1, steps - warm_up))
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2)


def optimiser_step(
    loss: torch.Tensor, module: nn.Module, optimiser: Optimiser, rate: float
) -> None:
    """Apply one update with gradients clipped to norm 1."""
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimiser.step()


def _save(path: Path, step: int, seconds: float, keep: Mapping[str, Stateful]) -> None:
    state = {"step": step, "seconds": seconds}
    state |= {name: thing.state_dict() for name, thing in keep.items()}
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)  # an interrupted save must not cost the last good one


def _log(log: TextIO, step: int, seconds: float, means: Mapping[str, float]) -> None:
    rounded = {key: round(value, 5) for key, value in means.items()}
    log.write(json.dumps({"step": step, "minutes": round(seconds / 60, 2), **rounded}) + "\n")
    log.flush()


def run_phase(
    name: str,
    work: Path,
    steps: int,
    keep: Mapping[str, Stateful],
    step: Callable[[int], dict[str, float]],
) -> None:
    """Call `step` for every step not yet done, saving `keep` under `work` as it goes.

    A run that ends early, by Ctrl-C too, continues where it last saved. Losses are appended to
    ``<name>.jsonl``.
    """
    path = work / f"{name}.pt"
    done, before = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        done, before = state["step"], state["seconds"]
        for key, thing in keep.items():
            thing.load_state_dict(state[key])
    started = saved = time.monotonic()
    sums: dict[str, float] = {}
    counted = 0
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"))
    with (
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress,
        (work / f"{name}.jsonl").open("a") as log,
    ):
        bar = progress.add_task(name, total=steps, completed=done, loss="")
        try:
            while done < steps:
                counted += 1
                for key, value in step(done).items():
                    sums[key] = sums.get(key, 0.0) + value
                done += 1
                now = time.monotonic()
                if done % REPORT_EVERY == 0:
                    means = {key: value / counted for key, value in sums.items()}
                    _log(log, done, before + now - started, means)
                    progress.update(bar, loss=" ".join(f"{k} {v:.4f}" for k, v in means.items()))
                    sums.clear()
                    counted = 0
                progress.update(bar, completed=done)
                if now - saved > SAVE_EVERY_SECONDS:
                    _save(path, done, before + now - started, keep)
                    saved = now
        finally:
            _save(path, done, before + time.monotonic() - started, keep)
