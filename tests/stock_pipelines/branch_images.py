"""Other pipelines of images that call their transformer once for each branch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .branch_flux_like import SIZE, TEXT, prompts, shifted
from .pipeline_case import PipelineCase, assembled, common, seeded, sharpened, valid

diffusers = pytest.importorskip("diffusers")


def lumina2() -> Any:
    return assembled(
        diffusers.Lumina2Pipeline,
        transformer=sharpened(
            lambda: diffusers.Lumina2Transformer2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=4,
                hidden_size=64,
                num_layers=2,
                num_refiner_layers=1,
                num_attention_heads=4,
                num_kv_heads=2,
                multiple_of=16,
                axes_dim_rope=(4, 6, 6),
                axes_lens=(64, 32, 32),
                cap_feat_dim=TEXT,
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


def lumina2_call(pipeline: Any) -> dict[str, Any]:
    """The masks of its prompts, of one shape, leave two lengths."""
    return common(
        guidance_scale=4.0,
        prompt_attention_mask=valid(7, 7),
        negative_prompt_attention_mask=valid(7, 3),
        **SIZE,
        **prompts(7, 7),
    )


def truncated_lumina2_call(pipeline: Any) -> dict[str, Any]:
    """Its last step has one branch."""
    return lumina2_call(pipeline) | {"cfg_trunc_ratio": 0.7}


def cogview4() -> Any:
    return assembled(
        diffusers.CogView4Pipeline,
        transformer=sharpened(
            lambda: diffusers.CogView4Transformer2DModel(
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=4,
                text_embed_dim=TEXT,
                time_embed_dim=16,
                condition_dim=8,
                pos_embed_max_size=16,
                sample_size=16,
                rope_axes_dim=(16, 16),
            )
        ),
        scheduler=shifted(),
    )


def cogview4_call(pipeline: Any) -> dict[str, Any]:
    return common(guidance_scale=5.0, **SIZE, **prompts())


def kandinsky5() -> Any:
    """It takes the nearest of a few sizes, which are large."""
    pipeline = assembled(
        diffusers.Kandinsky5T2IPipeline,
        transformer=sharpened(
            lambda: diffusers.Kandinsky5Transformer3DModel(
                in_visual_dim=4,
                in_text_dim=TEXT,
                in_text_dim2=12,
                time_dim=16,
                out_visual_dim=4,
                model_dim=64,
                ff_dim=64,
                num_text_blocks=1,
                num_visual_blocks=2,
                axes_dims=(4, 6, 6),
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.resolutions = [(SIZE["width"], SIZE["height"])]
    return pipeline


def kandinsky5_call(pipeline: Any) -> dict[str, Any]:
    """Its transformer returns an object with a sample, and not a tuple."""
    return common(
        guidance_scale=3.5,
        prompt_embeds_qwen=seeded(1, 7, TEXT),
        prompt_embeds_clip=seeded(1, 12, seed=2),
        prompt_cu_seqlens=torch.tensor([0, 7]),
        negative_prompt_embeds_qwen=seeded(1, 4, TEXT, seed=1),
        negative_prompt_embeds_clip=seeded(1, 12, seed=3),
        negative_prompt_cu_seqlens=torch.tensor([0, 4]),
        **SIZE,
    )


CASES = {
    name: PipelineCase(name, "branches", build, arguments, 2)
    for name, build, arguments in (
        ("Lumina 2", lumina2, lumina2_call),
        ("Lumina 2, truncated", lumina2, truncated_lumina2_call),
        ("CogView 4", cogview4, cogview4_call),
        ("Kandinsky 5", kandinsky5, kandinsky5_call),
    )
}
