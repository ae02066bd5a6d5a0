"""PipeFusion in one process, made of whole forwards: what the distributed one has to equal.

For each patch the model is called with the whole image. In its attention, keys and values of the
tokens of other patches are exchanged for those that PipeFusion says: what an earlier patch had in
this step, or what a later one had in the step before; and the text's for those that the first patch
had. Only the tokens of the patch itself are
right in that call, and only these are taken out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from omni_group_coordinator import split_sizes
from omni_pp.partition import find_block_lists

TEXT_FIRST = ("Flux", "QwenImage", "CogVideoX")
"""Beginnings of the classes whose attention has text before the image; others, after it."""

Pairs = list[tuple[Tensor, Tensor]]


class StaleReference:
    """Makes a denoiser compute what PipeFusion does.

    Args:
        model: The denoiser.
        patches: How many.
        warmup_steps: How many steps are exact.
        calls_per_step: How many calls there are in a step.
    """

    def __init__(
        self, model: nn.Module, patches: int, warmup_steps: int, calls_per_step: int
    ) -> None:
        self.model, self.patches, self.warmup = model, patches, warmup_steps
        self.calls_per_step = calls_per_step
        name = type(model).__name__
        self.text_first = name.startswith(TEXT_FIRST)
        self.calls = 0
        self.stale: dict[int, Pairs] = {}
        self.in_block = False
        self.tokens = 0
        self.heads: list[Tensor] = []
        self.own = (0, 0)
        self.last = True
        for found in find_block_lists(model):
            for block in model.get_submodule(found.name).children():
                block.register_forward_pre_hook(self._enter)
                block.register_forward_hook(self._leave)
        head: Any = model.all_final_layer if name.startswith("ZImage") else [model.proj_out]
        self.below = model.forward
        for one in head.values() if isinstance(head, nn.ModuleDict) else head:
            one.register_forward_hook(self._head)
        model.forward = self._call  # type: ignore[method-assign]

    def _enter(self, *_: Any) -> None:
        self.in_block = True

    def _leave(self, *_: Any) -> None:
        self.in_block = False

    def _head(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not self.tokens:  # an exact step
            self.found = output.shape[1]
            return None
        start, stop = self.own
        self.heads.append(output[:, start:stop])
        if not self.last:
            return None
        whole = torch.cat([*self.heads, output[:, self.tokens :]], dim=1)
        self.heads.clear()
        return whole

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        step, branch = divmod(self.calls, self.calls_per_step)
        self.calls += 1
        if step < self.warmup:
            self.tokens = 0
            kept: Pairs = []
            with _Attention(self, lambda key, value: kept.append((key, value))):
                result = self.below(*args, **kwargs)
            self.stale[branch] = [(key.clone(), value.clone()) for key, value in kept]
            return result
        self.tokens = self.image_tokens(args, kwargs)
        bounds = list(pairwise([0, *accumulate(split_sizes(self.tokens, self.patches))]))
        for self.own in bounds:
            self.last = self.own[1] == self.tokens
            with _Attention(self, self._exchange(self.stale[branch])):
                result = self.below(*_fresh(args), **_fresh(kwargs))
        return result

    def image_tokens(self, args: Any, kwargs: Any) -> int:
        """As the head saw them; of Z-Image, which has text there too, those of 32 that fit."""
        value = args[0] if args else next(iter(kwargs.values()))
        if isinstance(value, list):
            return -(-value[0].numel() // value[0].shape[0] // 4 // 32) * 32
        return int(self.found)

    def _exchange(self, stale: Pairs) -> Callable[[Tensor, Tensor], None]:
        index = -1

        def exchange(key: Tensor, value: Tensor) -> None:
            nonlocal index
            index += 1
            text = key.shape[2] - self.tokens
            first = text if self.text_first else 0
            start, stop = first + self.own[0], first + self.own[1]
            for fresh, old in zip((key, value), stale[index], strict=True):
                old[:, :, start:stop] = fresh[:, :, start:stop]
                words = 0 if self.text_first else self.tokens
                count = text if self.own[0] == 0 else 0
                old[:, :, words : words + count] = fresh[:, :, words : words + count]
                fresh.copy_(old)

        return exchange


class _Attention(TorchFunctionMode):
    """Shows keys and values of self-attention in the blocks, and lets them be changed."""

    def __init__(self, reference: StaleReference, change: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._reference, self._change = reference, change

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention and self._reference.in_block:
            for index, name in enumerate(("query", "key", "value")[: len(args)]):
                options[name] = args[index]
            if options["query"].shape[2] == options["key"].shape[2]:
                options["key"], options["value"] = options["key"].clone(), options["value"].clone()
                self._change(options["key"], options["value"])
            args = args[3:]
            if args:
                options["attn_mask"] = args[0]
            return func(**options)
        return func(*args, **options)


def _fresh(value: Any) -> Any:
    """Containers of a call copied: models take entries out of them."""
    if type(value) is dict:
        return {key: _fresh(one) for key, one in value.items()}
    return type(value)(map(_fresh, value)) if type(value) in (list, tuple) else value
