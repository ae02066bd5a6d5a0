"""A small transformer, a scheduler and a pipeline, with fixed random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omni_parallel_state import ParallelLayout, ParallelState
from omni_pp.pp_config import PipelineParallelConfig
from omni_pp.stages.application import apply_pipeline_parallel
from omni_pp.stages.pipeline_handle import PipelineHandle

WIDTH = 8


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """Random values that depend on shape and seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class ToyBlock(nn.Module):
    """Mixes the tokens of two streams of one sample."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(seeded(WIDTH, WIDTH, seed=seed) / WIDTH**0.5)
        self.calls: list[int] = []

    def forward(self, hidden_states: Tensor, text: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append(hidden_states.shape[0])
        both = torch.cat([text, hidden_states], dim=1)
        mixed = torch.softmax(both @ self.weight @ both.mT / WIDTH, dim=-1) @ both
        mixed = both + torch.tanh(mixed + shift[:, None])
        return mixed[:, : text.shape[1]], mixed[:, text.shape[1] :]


class ToyTransformer(nn.Module):
    """Blocks between an embedding and a head, which change their inputs too."""

    def __init__(self, blocks: int = 6, *, coupled: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(ToyBlock(seed) for seed in range(blocks))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.coupled = coupled
        for index, weight in enumerate([*self.embed.parameters(), *self.head.parameters()]):
            weight.requires_grad_(False).copy_(seeded(*weight.shape, seed=100 + index) / 2)
        self.requires_grad_(False)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        return_dict: bool = True,
    ) -> Any:
        hidden_states = self.embed(hidden_states)
        shift = timestep.reshape(-1, 1) / 10 * torch.ones(hidden_states.shape[0], WIDTH)
        text = encoder_hidden_states
        if self.coupled:
            text = text + text.mean(0, keepdim=True)
        for block in self.blocks:
            text, hidden_states = block(hidden_states, text, shift)
        sample = self.head(hidden_states)
        return ToyOutput(sample) if return_dict else (sample,)


@dataclass
class ToyOutput:
    """As diffusers returns it with ``return_dict=True``."""

    sample: Any


class ToyScheduler:
    """Steps that need the one before."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def step(self, prediction: Tensor, latents: Tensor, generator: Any = None) -> Tensor:
        last = prediction if self.last is None else self.last
        self.last = prediction
        noise = torch.randn(latents.shape, generator=generator)
        return latents - 0.1 * (1.5 * prediction - 0.5 * last) + 0.01 * noise


class ToyPipeline:
    """Guidance in two calls, or in one call of a doubled batch."""

    def __init__(self, transformer: nn.Module | None = None) -> None:
        self.transformer = ToyTransformer() if transformer is None else transformer
        self.scheduler = ToyScheduler()
        self.before_step: Callable[[int], None] = lambda step: None

    def __call__(
        self,
        prompt: Tensor,
        *,
        negative: Tensor | None = None,
        steps: int = 4,
        length: int = 7,
        doubled: bool = False,
        generator: torch.Generator | None = None,
    ) -> ToyOutput:
        self.scheduler.last = None
        latents = torch.randn(prompt.shape[0], length, WIDTH, generator=generator)
        for step in range(steps):
            self.before_step(step)
            t = torch.tensor([float(steps - step)])
            if negative is None:
                noise = self.transformer(latents, encoder_hidden_states=prompt, timestep=t).sample
            elif doubled:
                text, both = torch.cat([negative, prompt]), torch.cat([latents] * 2)
                found = self.transformer(
                    hidden_states=both,
                    encoder_hidden_states=text,
                    timestep=t.expand(both.shape[0]),
                    return_dict=False,
                )[0]
                without, noise = found.chunk(2)
                noise = without + 3 * (noise - without)
            else:
                noise = self.transformer(latents, prompt, timestep=t, return_dict=False)[0]
                without = self.transformer(latents, negative, timestep=t, return_dict=False)[0]
                noise = without + 3 * (noise - without)
            latents = self.scheduler.step(noise, latents, generator=generator)
        return ToyOutput(latents)


def request(seed: int = 0, *, rows: int = 1, text: int = 3, **options: Any) -> dict[str, Any]:
    """The arguments of a call; every one is equal to those of the same seed."""
    return {
        "prompt": seeded(rows, text, WIDTH, seed=10 + seed),
        "generator": torch.Generator().manual_seed(seed),
        **options,
    }


def guided(seed: int = 0, *, rows: int = 1, text: int = 3, **options: Any) -> dict[str, Any]:
    """As `request`, with a negative prompt."""
    negative = seeded(rows, text, WIDTH, seed=30 + seed)
    return request(seed, rows=rows, text=text, negative=negative, **options)


@torch.no_grad()
def alone(arguments: Mapping[str, Any], pipeline: ToyPipeline | None = None) -> Tensor:
    """What one process makes of a request."""
    found: Tensor = (ToyPipeline() if pipeline is None else pipeline)(**arguments).sample
    return found


def close(found: Tensor, expected: Tensor) -> None:
    """Equal within 1e-5 of the largest value: batches of other sizes take other kernels."""
    assert type(found) is Tensor
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def stages(target: Any, count: int, **options: Any) -> PipelineHandle:
    """Cut a pipeline, or a denoiser, into stages."""
    state = ParallelState(ParallelLayout(pp=count))
    return apply_pipeline_parallel(target, PipelineParallelConfig(**options), state=state)
