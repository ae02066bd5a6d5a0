"""How each class of denoisers is called, as data: arguments of one branch, on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omni_group_coordinator import ParallelConfigError


@dataclass(frozen=True)
class CallSize:
    """How large the call of a denoiser is."""

    height: int
    """Rows of the latent."""
    width: int
    """Columns of the latent."""
    frames: int
    """Frames of the latent."""
    text: int
    """Tokens of the prompt."""
    dtype: torch.dtype

    def tensor(self, *shape: int) -> Tensor:
        """A tensor without memory."""
        return torch.empty(shape, dtype=self.dtype, device="meta")


Inputs = Callable[[Any, CallSize], dict[str, Any]]


@dataclass(frozen=True)
class DenoiserClass:
    """What is to be known of a class to call it, and what it can be split into."""

    inputs: Inputs
    """Arguments of a call, from the configuration and the size."""
    blocks: tuple[str, ...] = ()
    """Lists of its blocks, in the order in which they run."""
    stages: bool = True
    """Whether stages can share the blocks."""
    patches: bool = False
    """Whether PipeFusion has a plan for it."""
    spatial: int = 8
    """Pixels of one side of a latent position, where there is no autoencoder that says it."""
    temporal: int = 1
    """Frames of a latent frame, likewise."""
    more_text: int = 0
    """Tokens beside those that the pipeline's ``max_sequence_length`` counts."""


def denoiser_class(name: str) -> DenoiserClass:
    """What is known of a class of diffusers.

    Raises:
        ParallelConfigError: Nothing is.
    """
    if name not in DENOISER_CLASSES:
        msg = (
            f"{name}: it is not known how it is called, so its work cannot be counted; known: "
            f"{', '.join(sorted(DENOISER_CLASSES))}"
        )
        raise ParallelConfigError(msg)
    return DENOISER_CLASSES[name]


def _packed(size: CallSize, patch: int) -> int:
    return size.frames * (size.height // patch) * (size.width // patch)


def _flux(config: Any, size: CallSize, axes: int = 3) -> dict[str, Any]:
    image = _packed(size, 2)
    given = {
        "hidden_states": size.tensor(1, image, config.in_channels),
        "encoder_hidden_states": size.tensor(1, size.text, config.joint_attention_dim),
        "timestep": size.tensor(1),
        "img_ids": size.tensor(image, axes),
        "txt_ids": size.tensor(size.text, axes),
    }
    if config.get("pooled_projection_dim"):
        given["pooled_projections"] = size.tensor(1, config.pooled_projection_dim)
    if config.get("guidance_embeds"):
        given["guidance"] = size.tensor(1)
    return given


def _flux2(config: Any, size: CallSize) -> dict[str, Any]:
    return _flux(config, size, axes=4)


def _qwen(config: Any, size: CallSize) -> dict[str, Any]:
    return {
        "hidden_states": size.tensor(1, _packed(size, 2), config.in_channels),
        "encoder_hidden_states": size.tensor(1, size.text, config.joint_attention_dim),
        "timestep": size.tensor(1),
        "img_shapes": [[(size.frames, size.height // 2, size.width // 2)]],
    }


def _image(config: Any, size: CallSize) -> dict[str, Any]:
    """Of models that are called with a latent image and a text."""
    names = ("joint_attention_dim", "caption_channels", "cross_attention_dim")
    width = next(config[name] for name in names if config.get(name))
    given: dict[str, Any] = {
        "hidden_states": size.tensor(1, config.in_channels, size.height, size.width),
        "encoder_hidden_states": size.tensor(1, size.text, width),
        "timestep": size.tensor(1),
    }
    if config.get("pooled_projection_dim"):
        given["pooled_projections"] = size.tensor(1, config.pooled_projection_dim)
    if config.get("guidance_embeds"):
        given["guidance"] = size.tensor(1)
    return given


def _pixart(config: Any, size: CallSize) -> dict[str, Any]:
    # A model of large images is told their size, in every dtype.
    large = config.get("use_additional_conditions")
    large = config.sample_size == 128 if large is None else large
    told = {"resolution": size.tensor(1, 2), "aspect_ratio": size.tensor(1, 1)}
    none = dict.fromkeys(told)
    return {**_image(config, size), "added_cond_kwargs": told if large else none}


def _video(config: Any, size: CallSize) -> dict[str, Any]:
    """Of models that are called with a latent video and a text."""
    names = ("text_dim", "text_embed_dim")
    width = next(config[name] for name in names if config.get(name))
    shape = (1, config.in_channels, size.frames, size.height, size.width)
    given = {
        "hidden_states": size.tensor(*shape),
        "encoder_hidden_states": size.tensor(1, size.text, width),
        "timestep": size.tensor(1),
    }
    if config.get("image_dim"):  # of a picture that the video begins with: CLIP's tokens
        given["encoder_hidden_states_image"] = size.tensor(1, 257, config.image_dim)
    return given


def _hunyuan_video(config: Any, size: CallSize) -> dict[str, Any]:
    given = _video(config, size)
    given["pooled_projections"] = size.tensor(1, config.pooled_projection_dim)
    given["encoder_attention_mask"] = size.tensor(1, size.text).bool()
    if config.get("guidance_embeds"):
        given["guidance"] = size.tensor(1)
    return given


def _ltx(config: Any, size: CallSize) -> dict[str, Any]:
    return {
        "hidden_states": size.tensor(1, _packed(size, 1), config.in_channels),
        "encoder_hidden_states": size.tensor(1, size.text, config.caption_channels),
        "timestep": size.tensor(1),
        "encoder_attention_mask": size.tensor(1, size.text),
        "num_frames": size.frames,
        "height": size.height,
        "width": size.width,
    }


def _cogvideox(config: Any, size: CallSize) -> dict[str, Any]:
    step = config.get("patch_size_t") or 1
    frames = -(-size.frames // step) * step
    shape = (1, frames, config.in_channels, size.height, size.width)
    given: dict[str, Any] = {
        "hidden_states": size.tensor(*shape),
        "encoder_hidden_states": size.tensor(1, config.max_text_seq_length, config.text_embed_dim),
        "timestep": size.tensor(1),
    }
    if config.get("use_rotary_positional_embeddings"):
        sides = (size.height // config.patch_size) * (size.width // config.patch_size)
        turns = size.tensor(frames // step * sides, config.attention_head_dim)
        given["image_rotary_emb"] = (turns, turns)
    if config.get("ofs_embed_dim"):
        given["ofs"] = size.tensor(1)
    return given


def _z_image(config: Any, size: CallSize) -> dict[str, Any]:
    shape = (config.in_channels, size.frames, size.height, size.width)
    return {
        "x": [size.tensor(*shape)],
        "t": size.tensor(1),
        "cap_feats": [size.tensor(size.text, config.cap_feat_dim)],
    }


def _unet(config: Any, size: CallSize) -> dict[str, Any]:
    width = config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    given: dict[str, Any] = {
        "sample": size.tensor(1, config.in_channels, size.height, size.width),
        "timestep": size.tensor(1),
        "encoder_hidden_states": size.tensor(1, size.text, width),
    }
    if config.get("addition_embed_type") == "text_time":
        ids = 6 if config.projection_class_embeddings_input_dim % 6 == 0 else 5
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        told = {"text_embeds": size.tensor(1, pooled), "time_ids": size.tensor(1, ids)}
        given["added_cond_kwargs"] = told
    return given


_DOUBLE_SINGLE = ("transformer_blocks", "single_transformer_blocks")
_JOINT_SINGLE = ("joint_transformer_blocks", "single_transformer_blocks")
_BLOCKS = ("transformer_blocks",)

DENOISER_CLASSES: Mapping[str, DenoiserClass] = {
    "AuraFlowTransformer2DModel": DenoiserClass(_image, _JOINT_SINGLE),
    "ChromaTransformer2DModel": DenoiserClass(_flux, _DOUBLE_SINGLE, stages=False),
    "CogVideoXTransformer3DModel": DenoiserClass(_cogvideox, _BLOCKS, patches=True, temporal=4),
    "Flux2Transformer2DModel": DenoiserClass(_flux2, _DOUBLE_SINGLE, patches=True),
    "FluxTransformer2DModel": DenoiserClass(_flux, _DOUBLE_SINGLE, patches=True),
    "HunyuanVideoTransformer3DModel": DenoiserClass(
        _hunyuan_video, _DOUBLE_SINGLE, patches=True, temporal=4
    ),
    "LTXVideoTransformer3DModel": DenoiserClass(
        _ltx, _BLOCKS, patches=True, spatial=32, temporal=8
    ),
    "PixArtTransformer2DModel": DenoiserClass(_pixart, _BLOCKS, patches=True),
    "QwenImageTransformer2DModel": DenoiserClass(_qwen, _BLOCKS, patches=True),
    "SD3Transformer2DModel": DenoiserClass(_image, _BLOCKS, patches=True, more_text=77),
    "SanaTransformer2DModel": DenoiserClass(_image, _BLOCKS, spatial=32),
    "UNet2DConditionModel": DenoiserClass(_unet, ("down_blocks", "up_blocks"), stages=False),
    "WanTransformer3DModel": DenoiserClass(_video, ("blocks",), patches=True, temporal=4),
    "ZImageTransformer2DModel": DenoiserClass(_z_image, ("layers",), patches=True),
}
"""Classes whose calls are known. What they can be cut into is what omni-pp takes."""


def blocks_of(module: nn.Module, kind: DenoiserClass) -> dict[str, nn.Module]:
    """Its blocks by name, in the order in which they run."""
    return {
        f"{name}.{index}": block
        for name in kind.blocks
        for index, block in enumerate(getattr(module, name, ()))
    }
