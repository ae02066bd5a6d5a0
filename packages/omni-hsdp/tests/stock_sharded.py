"""Small models of diffusers and transformers, with random weights, and a call of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from toy_sharded import seeded


@dataclass(frozen=True)
class ModelCase:
    """A model, and the arguments of a call."""

    build: Callable[[], nn.Module]
    call: Callable[[], dict[str, Any]]


def randomised(build: Callable[[], nn.Module], seed: int = 7) -> nn.Module:
    """The model with weights that all count: fresh ones are zero in places."""
    torch.manual_seed(seed)
    model = build()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model.eval()


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=False,
    )


def flux_call() -> dict[str, Any]:
    return {
        "hidden_states": seeded(1, 15, 8),
        "encoder_hidden_states": seeded(1, 7, 24),
        "pooled_projections": seeded(1, 20),
        "timestep": torch.full((1,), 0.5),
        "img_ids": seeded(15, 3, scale=4),
        "txt_ids": torch.zeros(7, 3),
        "return_dict": False,
    }


def qwen_image() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=8,
        out_channels=2,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )


def qwen_image_call() -> dict[str, Any]:
    return {
        "hidden_states": seeded(1, 15, 8),
        "encoder_hidden_states": seeded(1, 7, 24),
        "encoder_hidden_states_mask": torch.arange(7)[None] < 5,
        "timestep": torch.full((1,), 0.5),
        "img_shapes": [[(1, 3, 5)]],
        "return_dict": False,
    }


def wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    )


def wan_call() -> dict[str, Any]:
    return {
        "hidden_states": seeded(1, 4, 3, 6, 10),
        "timestep": torch.full((1,), 400.0),
        "encoder_hidden_states": seeded(1, 6, 16),
        "return_dict": False,
    }


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=20,
        caption_projection_dim=24,
        pooled_projection_dim=12,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def sd3_call() -> dict[str, Any]:
    return {
        "hidden_states": seeded(2, 4, 6, 10),
        "encoder_hidden_states": seeded(2, 7, 20),
        "pooled_projections": seeded(2, 12),
        "timestep": torch.full((2,), 500.0),
        "return_dict": False,
    }


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def unet_call() -> dict[str, Any]:
    return {
        "sample": seeded(1, 4, 8, 8),
        "timestep": torch.full((1,), 500),
        "encoder_hidden_states": seeded(1, 7, 12),
        "return_dict": False,
    }


def t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=50,
        d_model=24,
        d_kv=8,
        d_ff=36,
        num_layers=3,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def t5_call() -> dict[str, Any]:
    return {"input_ids": torch.arange(12)[None] % 50, "return_dict": False}


CASES = {
    "Flux": ModelCase(flux, flux_call),
    "QwenImage": ModelCase(qwen_image, qwen_image_call),
    "Wan": ModelCase(wan, wan_call),
    "SD3": ModelCase(sd3, sd3_call),
    "T5 encoder": ModelCase(t5, t5_call),
    "UNet": ModelCase(unet, unet_call),
}
