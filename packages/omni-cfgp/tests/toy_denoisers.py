"""Small denoisers with fixed random weights, and a pipeline and a scheduler to call them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from toy_results import Output, seeded

from omni_cfgp import CFGParallelConfig, apply_cfg_parallel, guided_by_stages
from omni_parallel_state import Handle, ParallelLayout, ParallelState
from omni_parallel_state.denoising.waiting import resolve

WIDTH = 8


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(resolve(found), resolve(expected), rtol=1e-5, atol=1e-6)


def in_tuple(sample: Tensor) -> Any:
    return (sample,)


def of_several_dtypes(sample: Tensor) -> Any:
    """Two predictions and something about them; a row of each for each sample."""
    return sample, sample[:, :3, :5].half(), {"largest": sample.flatten(1).argmax(1), "kind": "x"}


class Toy(nn.Module):
    """A sample and its prompt make a prediction; every input changes it."""

    def __init__(self, wrap: Callable[[Tensor], Any] = in_tuple) -> None:
        super().__init__()
        self.weight = nn.Parameter(seeded(WIDTH, WIDTH, seed=91) * 0.4, requires_grad=False)
        self.wrap = wrap
        self.flag = 1.0
        self.calls = 0

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        options: dict[str, Any] | None = None,
    ) -> Any:
        if not torch.compiler.is_compiling():
            self.calls += 1
        found = torch.tanh(hidden_states @ self.weight.to(hidden_states.dtype))
        if encoder_hidden_states is not None:
            text = torch.sin(encoder_hidden_states * 2).mean(1, keepdim=True)
            found = found * (1 + 0.5 * text.to(found.dtype)) + text.to(found.dtype)
        if timestep is not None:
            found = found + 0.1 * timestep.reshape(-1, 1, 1).to(found.dtype)
        if options is not None:
            found = found * options.get("scale", 1.0)
        return self.wrap(self.flag * found)


class Failing(Toy):
    """Raises where its prompt begins with a number above 50."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        prompt = kwargs.get("encoder_hidden_states", args[0] if args else None)
        if prompt is not None and (prompt[:, 0, 0] > 50).any():
            msg = "out of toys"
            raise ZeroDivisionError(msg)
        return super().forward(hidden_states, *args, **kwargs)


class Coupled(Toy):
    """Its samples see each other, as in training with batch norm."""

    def forward(self, hidden_states: Tensor, text: Any = None, timestep: Any = None) -> Any:
        text = text if text is None else text - text.mean(0)
        return super().forward(hidden_states - hidden_states.mean(0), text, timestep)


class Cached(Toy):
    """Keeps what it computed for each branch and adds it in the next step, as caches do."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[float, Tensor] = {}

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        (found,) = super().forward(hidden_states, *args, **kwargs)
        branch = float(args[0].sum())
        found = found + 0.5 * self.kept.get(branch, torch.zeros_like(found))
        self.kept[branch] = found
        return (found,)


class OfLists(nn.Module):
    """Takes a list of samples of any lengths, and of their prompts; returns a list."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = Toy()

    def forward(self, x: list[Tensor], t: Tensor, cap_feats: list[Tensor]) -> Any:
        rows = zip(x, t, cap_feats, strict=True)
        return ([self.toy(a[None], c[None], b)[0][0] for a, b, c in rows],)


class Scheduler:
    """Small steps along the prediction, and noise if a strength is given; needs real tensors."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise
        self.timesteps: Tensor | None = None

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = torch.linspace(1.0, 0.1, steps)

    def step(
        self,
        prediction: Any,
        t: Any,
        latents: Any,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        if type(prediction) is not Tensor:
            msg = f"the scheduler got a {type(prediction).__name__}"
            raise TypeError(msg)
        noise = torch.randn(latents.shape, generator=generator) if self.noise else latents
        return (latents - 0.3 * prediction + self.noise * noise,)


class Pipeline:
    """Calls its denoiser once for each branch, or once with a batch of the branches."""

    def __init__(self, transformer: Any, noise: float = 0.0, *, batched: bool = False) -> None:
        self.transformer = transformer
        self.scheduler = Scheduler(noise)
        self.batched = batched
        self.memory: dict[str, Any] = {}

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Tensor],
        scale: float = 3.0,
        *,
        steps: int = 3,
        generator: Any = None,
        latents: Tensor | None = None,
        unguided: Sequence[int] = (),
    ) -> Any:
        first = generator[0] if isinstance(generator, list) else generator
        if latents is None:
            latents = torch.randn(1, 6, WIDTH, generator=first)
        self.scheduler.set_timesteps(steps)
        for index, t in enumerate(self.scheduler.timesteps):
            some = prompts[:1] if index in unguided else prompts
            noise = self.combined(latents, some, t, scale)
            latents = self.scheduler.step(noise, t, latents, generator=first)[0]
        return Output(latents)

    def combined(self, latents: Tensor, prompts: Sequence[Tensor], t: Tensor, scale: float) -> Any:
        if self.batched:
            batch = torch.cat([latents] * len(prompts))
            found = self.transformer(batch, torch.cat(list(prompts)), t[None])[0]
            predictions = list(found.chunk(len(prompts)))
        else:
            predictions = [self.transformer(latents, prompt, t[None])[0] for prompt in prompts]
        return guided_by_stages(predictions, [scale] * (len(prompts) - 1))


def prompts_of(branches: int, lengths: Sequence[int] = ()) -> list[Tensor]:
    """A prompt for each branch; of one length, or of different ones."""
    sizes = lengths or [4] * branches
    return [seeded(1, size, WIDTH, seed=20 + i) for i, size in enumerate(sizes)]


def failing(prompt: Tensor) -> Tensor:
    """The prompt with which `Failing` fails."""
    return torch.cat([torch.full_like(prompt[:, :1], 99.0), prompt[:, 1:]], 1)


def state_of(cfg: int) -> ParallelState:
    return ParallelState(ParallelLayout(cfg=cfg))


def divide(target: Any, cfg: int, **options: Any) -> Handle:
    """Guidance of a pipeline or denoiser over so many ranks."""
    return apply_cfg_parallel(target, CFGParallelConfig(**options), state=state_of(cfg))


class Records(logging.Handler):
    """What the package has logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> Records:
        logging.getLogger("omni_cfgp").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("omni_cfgp").removeHandler(self)


def count_rows(module: nn.Module) -> list[int]:
    """How many rows each call of a module had."""
    found: list[int] = []
    module.register_forward_pre_hook(lambda _, args: found.append(len(args[0])))
    return found
