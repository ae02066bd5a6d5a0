"""Attention on shards: this rank's queries see the keys of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_vaes import error, everyone, on_shards, part_of, random, text_of
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from omni_vae_patch.spatial.attention import shard_attention
from omni_vae_patch.spatial.partition import HEIGHT, WIDTH, partition


class Attention(nn.Module):
    """Over the positions of an image, or over those of all frames of a video."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask(x)
        tokens = x.flatten(2).mT.unsqueeze(1)  # (batch, 1, tokens, channels)
        query, key, value = tokens * 3, tokens.roll(1, -1), tokens.square()
        out = self.attended(query, key, value, mask)
        return out.squeeze(1).mT.reshape(x.shape)

    def mask(self, x: Tensor) -> Tensor | None:
        return None

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value, mask, **self.options)


class FrameMasked(Attention):
    """A token sees its own frame and earlier ones."""

    def mask(self, x: Tensor) -> Tensor:
        frames, positions = x.shape[2], x.shape[3] * x.shape[4]
        index = torch.arange(frames).repeat_interleave(positions)
        return index[:, None] >= index[None]


class Processor:
    """As diffusers' modules have one, and this one imports the function by its name."""

    def __call__(self, module: Attention, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT.unsqueeze(1)
        found = scaled_dot_product_attention(tokens, tokens * 2, tokens.square())
        return found.squeeze(1).mT.reshape(x.shape)


class Processed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.processor = Processor()

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x)


class ByHand(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        return ((tokens @ tokens.mT).softmax(-1) @ tokens).mT.reshape(x.shape)


IMAGE, VIDEO = random(2, 4, 7, 5), random(1, 4, 3, 5, 4)
CASES: dict[str, tuple[nn.Module, Tensor, int]] = {
    "image": (Attention(), IMAGE, HEIGHT),
    "image across": (Attention(), IMAGE, WIDTH),
    "scaled": (Attention(scale=0.9), IMAGE, HEIGHT),
    "video": (Attention(), VIDEO, HEIGHT),
    "masked by frame": (FrameMasked(), VIDEO, HEIGHT),
    "masked by frame, across": (FrameMasked(), VIDEO, WIDTH),
    "processor": (Processed(), IMAGE, HEIGHT),
    "fewer rows than ranks": (Attention(), random(1, 4, 2, 6), HEIGHT),
}


@torch.no_grad()
def errors() -> dict[str, float]:
    group, found = everyone(), {}
    for name, (module, x, dim) in CASES.items():
        before = type(module), dict(vars(module))
        rows = partition(x.shape[dim], group.world_size, dim)
        expected = part_of(module(x), rows, group.rank_in_group, 1)

        def call(part: Tensor, module: nn.Module = module, rows: Any = rows) -> Tensor:
            return module(part)

        got = on_shards(group, module, shard_with_frames(x), call, x, rows)
        found[name] = 0.0 if got is None else error(got, expected)
        assert (type(module), dict(vars(module))) == before
    return found


def shard_with_frames(x: Tensor) -> Any:
    """The rule, where the convolution before the attention has told how many frames there are."""

    def rule(name: str, module: nn.Module, region: Any) -> Any:
        undo = shard_attention(name, module, region)

        def tell(_: nn.Module, __: Any) -> None:
            if region.shard is not None and x.ndim == 5:
                region.shard.frames = x.shape[2]

        hook = module.register_forward_pre_hook(tell)

        def undo_both() -> None:
            hook.remove()
            undo()

        return undo_both

    return rule


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_rank_has_its_queries_over_all_keys(ranks, world_size):
    for found in ranks.run(errors, world_size=world_size):
        assert max(found.values()) <= 1e-5, found


def test_these_inputs_tell_the_whole_from_the_parts():
    """The tests above would pass by themselves if attention hardly mixed tokens."""
    for module, x, dim in CASES.values():
        whole = module(x)
        rows = partition(x.shape[dim], 2, dim)
        alone = module(part_of(x, rows, 0, 1))
        assert error(alone, part_of(whole, rows, 0, 1)) > 1e-3


@torch.no_grad()
def refusals() -> list[str]:
    group = everyone()
    rows = partition(7, group.world_size, HEIGHT)
    causal = Attention(is_causal=True)
    return [
        text_of(lambda: on_shards(group, causal, shard_attention, causal, IMAGE, rows)),
        text_of(lambda: shard_attention("mid.attn", ByHand(), None)),
    ]


def test_attention_that_cannot_be_sharded_is_named(ranks):
    for causal, by_hand in ranks.run(refusals):
        assert "attention of module 'net.part' is causal over space" in causal
        assert "module 'mid.attn', a ByHand" in by_hand
        assert "scaled_dot_product_attention" in by_hand
