"""Transformers of diffusers with random weights, small enough for a CPU, and their inputs."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

HEADS: Final = 8
HEAD_DIM: Final = 64
TEXT_DIM: Final = 256
_CHANNELS: Final = 64
_SEED: Final = 7
_QUERY_KEY_NORMS: Final = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
_VALUE_OUT: Final = ("to_v", "add_v_proj", "to_out", "to_add_out")


@dataclass(frozen=True)
class Family:
    """One class of diffusers.

    Attributes:
        build: Makes the model with this many attention layers and this size of a head.
        inputs: Makes the arguments of a call with this many tokens in attention.
        blocks: Attribute with the list of blocks whose last one `shorten` may drop.
    """

    build: Callable[[int, int], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    blocks: str


def build(
    family: str, layers: int, dtype: torch.dtype = torch.float32, head_dim: int = HEAD_DIM
) -> nn.Module:
    """A model with random weights, the same ones in every process."""
    torch.manual_seed(_SEED)
    model = FAMILIES[family].build(layers, head_dim)
    with torch.no_grad():
        _boost(model)
    return model.to(dtype).eval().requires_grad_(False)


def inputs(family: str, tokens: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of a call of a model, the same ones in every process."""
    torch.manual_seed(_SEED)
    arguments = FAMILIES[family].inputs(tokens)
    ids = ("img_ids", "txt_ids", "timestep")
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and name not in ids else value
        for name, value in arguments.items()
    }


def twin(model: nn.Module) -> nn.Module:
    """A model of its own over the same weights in memory, so that hooks don't meet."""
    shared = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def shorten(family: str, model: nn.Module) -> nn.Module:
    """A twin without its last block: what that block costs is the difference."""
    shorter = twin(model)
    blocks = getattr(shorter, FAMILIES[family].blocks)
    setattr(shorter, FAMILIES[family].blocks, blocks[:-1])
    return shorter


def attention_bytes(tokens: int, dtype: torch.dtype) -> int:
    """Bytes of a whole query of the whole sequence."""
    return tokens * HEADS * HEAD_DIM * dtype.itemsize


def text_and_image(tokens: int) -> tuple[int, int]:
    """Split a joint sequence into text, at most 512 tokens, and image."""
    text = min(512, tokens // 5)
    return text, tokens - text


def near_square(count: int) -> tuple[int, int]:
    """Height and width, of this product, that differ least; height is the smaller."""
    height = next(h for h in range(math.isqrt(count), 0, -1) if count % h == 0)
    return height, count // height


def _boost(model: nn.Module) -> None:
    """Let attention matter: with default weights it is nearly an average over all tokens.

    Queries and keys of these models are normalised, so a scale works on the norm's weight, not on
    the projection's.
    """
    for name, parameter in model.named_parameters():
        owners = name.split(".")[-3:-1]
        if any(owner in _QUERY_KEY_NORMS for owner in owners):
            parameter.mul_(math.sqrt(3.0))
        elif any(owner in _VALUE_OUT for owner in owners):
            parameter.mul_(2.0)


def _axes(head_dim: int) -> tuple[int, int, int]:
    """What of a head turns with time, row and column."""
    return head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8


def _flux(layers: int, head_dim: int) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    double = layers // 3
    model: nn.Module = FluxTransformer2DModel(
        in_channels=_CHANNELS,
        num_layers=double,
        num_single_layers=layers - double,
        attention_head_dim=head_dim,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        axes_dims_rope=_axes(head_dim),
    )
    return model


def _flux_inputs(tokens: int) -> dict[str, Any]:
    text, image = text_and_image(tokens)
    height, width = near_square(image)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return {
        "hidden_states": torch.randn(1, image, _CHANNELS),
        "encoder_hidden_states": torch.randn(1, text, TEXT_DIM),
        "pooled_projections": torch.randn(1, TEXT_DIM),
        "timestep": torch.full((1,), 0.5),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).float(),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def _qwen(layers: int, head_dim: int) -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    model: nn.Module = QwenImageTransformer2DModel(
        in_channels=_CHANNELS,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=_axes(head_dim),
    )
    return model


def _qwen_inputs(tokens: int) -> dict[str, Any]:
    text, image = text_and_image(tokens)
    return {
        "hidden_states": torch.randn(1, image, _CHANNELS),
        "encoder_hidden_states": torch.randn(1, text, TEXT_DIM),
        "timestep": torch.full((1,), 0.5),
        "img_shapes": [[(1, *near_square(image))]],
        "return_dict": False,
    }


def _wan(layers: int, head_dim: int) -> nn.Module:
    from diffusers import WanTransformer3DModel

    model: nn.Module = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=head_dim,
        text_dim=TEXT_DIM,
        ffn_dim=1408,
        num_layers=layers,
    )
    return model


def _wan_inputs(tokens: int) -> dict[str, Any]:
    frames = next(f for f in (5, 4, 3, 2, 1) if tokens % f == 0)
    height, width = near_square(tokens // frames)
    return {
        "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width),
        "encoder_hidden_states": torch.randn(1, 128, TEXT_DIM),
        "timestep": torch.full((1,), 500),
        "return_dict": False,
    }


FAMILIES: Final = {
    "flux": Family(_flux, _flux_inputs, "single_transformer_blocks"),
    "qwen": Family(_qwen, _qwen_inputs, "transformer_blocks"),
    "wan": Family(_wan, _wan_inputs, "blocks"),
}
