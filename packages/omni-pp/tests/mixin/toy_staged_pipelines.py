"""A pipeline that is written for stages, with fixed random weights, and what runs it on ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from omni_cfgp import CFGParallelMixin
from omni_parallel_state import ParallelLayout, ParallelState, get_parallel_state
from omni_parallel_state.denoising.waiting import resolve
from omni_pp.pipeline_parallel import PipelineParallelMixin

WIDTH = 8
LAYERS = 6


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """Random values that depend on shape and seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state_of(pp: int, cfg: int = 1) -> ParallelState:
    return ParallelState(ParallelLayout(pp=pp, cfg=cfg))


def in_stages(pp: int, cfg: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on ranks that are so many stages in so many columns."""
    with state_of(pp, cfg).use():
        return function(*args)


class Transformer:
    """Layers, of which each stage runs a part; what flows is a dict, a tuple or a tensor."""

    def __init__(self, flow: str = "dict", outputs: int = 1) -> None:
        self.weights = [seeded(WIDTH, WIDTH, seed=10 + i) / WIDTH**0.5 for i in range(LAYERS)]
        self.flow = flow
        self.outputs = outputs
        self.calls: list[int] = []
        self.fails_on: int | None = None
        self.fails_in_call: int | None = None

    def __call__(
        self,
        hidden_states: Tensor,
        text: Tensor,
        timestep: Tensor | None = None,
        intermediate_tensors: Any = None,
    ) -> Any:
        stages = get_parallel_state().pp
        stage, count = stages.rank_in_group, stages.world_size
        self.calls.append(text.shape[1])
        if self.fails_on == text.shape[1] or self.fails_in_call == len(self.calls) - 1:
            msg = "out of toys"
            raise ZeroDivisionError(msg)
        if stage == 0:
            assert intermediate_tensors is None
            hidden = hidden_states
        else:
            hidden, text = self.unpacked(intermediate_tensors, text)
        for weight in self.weights[stage * LAYERS // count : (stage + 1) * LAYERS // count]:
            shift = torch.sin(text * 2).mean(1, keepdim=True)
            hidden = torch.tanh(hidden @ weight + shift) + hidden
            text = text * 0.9
        if timestep is not None and stage == count - 1:
            hidden = hidden + 0.1 * timestep
        if stage < count - 1:
            return self.packed(hidden, text)
        if self.outputs == 1:
            return (hidden,)
        return ((hidden, hidden[:, :3].double()), "more")

    def packed(self, hidden: Tensor, text: Tensor) -> Any:
        if self.flow == "tensor":
            return torch.cat([hidden, text], 1)
        if self.flow == "tuple":
            return hidden.mT.contiguous().mT, [text]
        return {"hidden": hidden, "more": {"text": text, "kind": "toy"}, "none": None}

    def unpacked(self, given: Any, text: Tensor) -> tuple[Tensor, Tensor]:
        if self.flow == "tensor":
            length = text.shape[1]
            return given[:, :-length], given[:, -length:]
        if self.flow == "tuple":
            assert type(given) is tuple
            return given[0], given[1][0]
        assert given["more"]["kind"] == "toy"
        return given["hidden"], given["more"]["text"]


class Scheduler:
    """Small steps along the prediction, with noise where there is a generator."""

    def __init__(self) -> None:
        self.steps = 0
        self.fails_in: int | None = None

    def step(
        self,
        prediction: Tensor,
        t: Any,
        latents: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        assert type(prediction) is Tensor
        assert type(latents) is Tensor
        if self.fails_in == self.steps:
            msg = "out of steps"
            raise LookupError(msg)
        self.steps += 1
        found = latents - 0.3 * t * prediction
        if generator is not None:
            found = found + 0.1 * torch.randn(latents.shape, generator=generator)
        return (found,)


class Loop:
    """What all toy pipelines do: a loop over steps."""

    def __init__(self, transformer: Any = None) -> None:
        self.transformer = Transformer() if transformer is None else transformer
        self.scheduler = Scheduler()
        self.seen: list[Any] = []

    def prompts(self, lengths: Sequence[int]) -> list[Tensor]:
        return [seeded(1, length, WIDTH, seed=40 + i) for i, length in enumerate(lengths)]

    def diffuse(
        self,
        lengths: Sequence[int] = (4, 7),
        tokens: int = 6,
        steps: int = 3,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Any:
        """The latents, and half of them."""
        latents = seeded(1, tokens, WIDTH, seed=tokens)
        prompts = self.prompts(lengths)
        for t in torch.linspace(1.0, 0.2, steps):
            prediction = self.predicted(latents, prompts, t, options)
            if isinstance(prediction, tuple):
                prediction = prediction[0] + 0.1 * prediction[1].sum().float()
            latents = self.scheduler_step_maybe_with_cfg(
                prediction, t, latents, len(lengths) > 1, generator=generator
            )
            self.seen.append(latents)
        return {"latents": latents, "half": (latents / 2,)}

    def predicted(
        self, latents: Tensor, prompts: Sequence[Tensor], t: Tensor, options: dict[str, Any]
    ) -> Any:
        branches = [{"hidden_states": latents, "text": p, "timestep": t} for p in prompts]
        if len(branches) < 3:
            return self.predict_noise_maybe_with_cfg(
                len(branches) > 1, 3.0, branches[0], branches[-1], **options
            )
        scales = {str(i): 2.0 + i for i in range(len(branches) - 1)}
        return self.predict_noise_with_multi_branch_cfg(True, scales, branches, **options)


class Alone(Loop, CFGParallelMixin):
    """In one process."""


class Staged(PipelineParallelMixin, Loop, CFGParallelMixin):
    """In stages, every one of which gets the latents."""


class Ends(Staged):
    """In stages, of which those in the middle keep their latents."""

    pp_latents_on = "ends"


class TwoAtOnce(Staged):
    """Asks for two predictions in a step, makes two steps of it, and ends with a prediction."""

    def diffuse(self, steps: int = 2) -> Any:  # type: ignore[override]
        latents, sound = seeded(1, 6, WIDTH, seed=1), seeded(1, 3, WIDTH, seed=2)
        prompts = self.prompts((4, 7))
        for t in torch.linspace(1.0, 0.2, steps):
            one = self.predicted(latents, prompts, t, {})
            other = self.predicted(sound, prompts, t, {})
            latents = self.scheduler_step_maybe_with_cfg(one, t, latents, True)
            sound = self.scheduler_step_maybe_with_cfg(other, t, sound, True)
            assert real(sound).shape == (1, 3, WIDTH)
        self.predicted(latents, prompts, t, {})
        return latents, [sound]


def alone(lengths: Sequence[int], transformer: Any = None, **options: Any) -> Any:
    """What one process gives."""
    with ParallelState(ParallelLayout()).use():
        return Alone(transformer).diffuse(lengths, **options)


def real(value: Any) -> Tensor:
    found: Tensor = resolve(value)
    return found
