"""The steps of schedulers wait for no patch, and are bit for bit those of real tensors."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from test_patchwise import SHAPES, Source
from torch import Tensor

from omni_pp.pipefusion.patch_values import Ledger
from omni_pp.pipefusion.patchwise import PatchwiseTensor, real_of
from omni_pp.pipefusion.schedulers import ELEMENTWISE

pytestmark = pytest.mark.filterwarnings("ignore")  # numpy's and diffusers' own

DRAIN = {"PNDMScheduler", "SASolverScheduler"}
"""Add in place, and sum in a way of their own."""


class Steps:
    """A request's steps with predictions that arrive patch by patch, or are there."""

    def __init__(self, name: str, kind: str, *, arrive: bool) -> None:
        import diffusers

        torch.manual_seed(0)
        self.scheduler: Any = getattr(diffusers, name)()
        self.scheduler.set_timesteps(5)
        self.kind, self.arrive = kind, arrive
        self.ledger = Ledger()
        self.generator = torch.Generator().manual_seed(3)
        self.waited = False
        self.previous: Any = None

    def run(self) -> Tensor:
        """The latents at the end."""
        noise = torch.Generator().manual_seed(9)
        latents: Any = torch.randn(SHAPES[self.kind][0], generator=noise)
        times = list(self.scheduler.timesteps)
        for index, t in enumerate(times):
            if hasattr(self.scheduler, "scale_model_input"):
                self.scheduler.scale_model_input(latents, t)
            source = Source(self.kind, index, self.ledger)
            prediction = source.tensor if self.arrive else source.real
            latents = self._step(prediction, times, index, latents)
            self.waited |= bool(source.asked)
            self.ledger.settle()
        return real_of(latents) if isinstance(latents, PatchwiseTensor) else latents

    def _step(self, prediction: Tensor, times: list[Any], index: int, latents: Any) -> Any:
        step, more = self.scheduler.step, {}
        names = inspect.signature(step).parameters
        if "generator" in names:
            more["generator"] = self.generator
        if "timestep_back" in names:
            back = times[index - 1] if index else None
            latents, self.previous = step(
                prediction, self.previous, times[index], back, latents, return_dict=False, **more
            )
            return latents
        return step(prediction, times[index], latents, return_dict=False, **more)[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["packed", "video"])
@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_steps_wait_for_nothing(name: str, kind: str) -> None:
    try:
        expected = Steps(name, kind, arrive=False).run()
    except ImportError as missing:  # scipy, torchsde
        pytest.skip(str(missing).strip().partition("\n")[0])
    steps = Steps(name, kind, arrive=True)
    assert torch.equal(steps.run(), expected)
    assert steps.waited == (name in DRAIN)
