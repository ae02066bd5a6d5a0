"""How the models of diffusers are cut along their image tokens, by name of the class.

The forwards of diffusers 0.42 were read for it. What flows from block to block needs no entry: a
patch goes in at the first block and comes out at the head.
"""

from __future__ import annotations

from dataclasses import replace

from omni_pp.pipefusion.patch_plan import Count, Cut, PatchPlan, Text, TextTokens, Tokens

_TOKENS = Cut(1, ndim=3)
_TEXT = Text(1)
_PACKED = Tokens("hidden_states")
_IP = "an IP-Adapter's further attention was not looked at"

_WORDS = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
_CROSS = ("attn2.to_k", "attn2.to_v", "attn2.to_kv", "attn2.norm_k")


def _in(blocks: str, *names: str) -> tuple[str, ...]:
    """Modules of these names in each block of a list."""
    return tuple(f"{blocks}.*.{name}" for name in names)


FLUX = PatchPlan(
    tokens=_PACKED,
    text=TextTokens(),
    call={
        "hidden_states": _TOKENS,
        "img_ids": Cut(-2),
        "encoder_hidden_states": _TEXT,
        "txt_ids": Text(-2),
    },
    attentions={
        "transformer_blocks": {"attn": "text first"},
        "single_transformer_blocks": {"attn": "text first"},
    },
    once=(
        "time_text_embed",
        *_in("transformer_blocks", "norm1.linear", "norm1_context.linear"),
        *_in("single_transformer_blocks", "norm.linear"),
        "norm_out.linear",
    ),
    words=("context_embedder", *_in("transformer_blocks", *_WORDS, "ff_context")),
)

FLUX_2 = replace(
    FLUX,
    once=(
        "time_guidance_embed",
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
        "norm_out.linear",
    ),
)
"""Its single blocks take text and image in one sequence."""

QWEN_IMAGE = PatchPlan(
    tokens=_PACKED,
    text=TextTokens(),
    call={"hidden_states": _TOKENS},
    first={"encoder_hidden_states": _TEXT},
    blocks={
        "image_rotary_emb": (Cut(0), Text(0)),
        "encoder_hidden_states_mask": _TEXT,
        "modulate_index": Cut(1),
    },
    attentions={"transformer_blocks": {"attn": "text first"}},
    keys_are_valid=True,
    once=(
        "time_text_embed",
        "txt_norm",
        "txt_in",
        "pos_embed",
        *_in("transformer_blocks", "img_mod", "txt_mod"),
        "norm_out.linear",
    ),
    words=_in("transformer_blocks", *_WORDS, "txt_mlp"),
)

WAN = PatchPlan(
    tokens=Tokens("hidden_states", (2, 3, 4), ("patch_size",) * 3),
    call={"timestep": Cut(1, ndim=2)},  # for each token, in Wan 2.2
    first={"hidden_states": _TOKENS},
    blocks={"rotary_emb": Cut(1, ndim=4)},
    attentions={"blocks": {"attn1": "image"}},
    once=(
        "rope",
        "condition_embedder.text_embedder",
        "condition_embedder.image_embedder",
        *_in("blocks", *_CROSS, "attn2.add_k_proj", "attn2.add_v_proj", "attn2.norm_added_k"),
    ),
    once_in_a_step=("condition_embedder.time_embedder", "condition_embedder.time_proj"),
)

SD3 = PatchPlan(
    tokens=Tokens("hidden_states", (2, 3), ("patch_size",) * 2),
    text=TextTokens(),
    first={"hidden_states": _TOKENS, "encoder_hidden_states": _TEXT},
    attentions={"transformer_blocks": {"attn": "text last", "attn2?": "image"}},
    once=(
        "time_text_embed",
        "context_embedder",
        *_in("transformer_blocks", "norm1.linear", "norm1_context.linear"),
        "norm_out.linear",
    ),
    words=_in("transformer_blocks", *_WORDS, "ff_context"),
)

HUNYUAN_VIDEO = PatchPlan(
    tokens=Tokens("hidden_states", (2, 3, 4), ("patch_size_t", "patch_size", "patch_size")),
    text=TextTokens(),
    first={"hidden_states": _TOKENS, "encoder_hidden_states": _TEXT},
    blocks={"freqs_cis": Cut(0), "image_rotary_emb": Cut(0), "num_tokens": Count()},
    attentions={
        "transformer_blocks": {"attn": "text last"},
        "single_transformer_blocks": {"attn": "text last"},
    },
    once=(
        "context_embedder",
        "time_text_embed",
        "rope",
        *_in("transformer_blocks", "norm1.linear", "norm1_context.linear"),
        *_in("single_transformer_blocks", "norm.linear"),
        "norm_out.linear",
    ),
    words=_in("transformer_blocks", *_WORDS, "ff_context"),
)

LTX = PatchPlan(
    tokens=_PACKED,
    call={"hidden_states": _TOKENS, "timestep": Cut(1, ndim=2)},
    blocks={"image_rotary_emb": Cut(1)},
    attentions={"transformer_blocks": {"attn1": "image"}},
    once=("rope", "caption_projection", *_in("transformer_blocks", *_CROSS)),
    once_in_a_step=("time_embed",),
)

COGVIDEOX = PatchPlan(
    tokens=Tokens("hidden_states", (1, 3, 4), ("patch_size_t", "patch_size", "patch_size")),
    text=TextTokens(),
    first={"hidden_states": _TOKENS, "encoder_hidden_states": _TEXT},
    blocks={"image_rotary_emb": Cut(0)},
    attentions={"transformer_blocks": {"attn1": "text first"}},
    once=(
        "time_embedding",
        "patch_embed.text_proj",
        *_in("transformer_blocks", "norm1.linear", "norm2.linear"),
        "norm_out.linear",
    ),
)

PIXART = PatchPlan(
    tokens=Tokens("hidden_states", (2, 3), ("patch_size",) * 2),
    first={"hidden_states": _TOKENS},
    attentions={"transformer_blocks": {"attn1": "image"}},
    once=("adaln_single", "caption_projection", *_in("transformer_blocks", *_CROSS)),
    refused={"attention_mask": "it is a mask of the image tokens, which PixArt fits to each patch"},
)

Z_IMAGE = PatchPlan(
    tokens=Tokens("x", (1, 2, 3), ("f_patch_size", "patch_size", "patch_size"), multiple=32),
    text=TextTokens("cap_feats", 0, multiple=32),
    first={"x": Cut(1, "text last")},
    blocks={"freqs_cis": Cut(1, "text last")},
    attentions={"layers": {"attention": "text last"}},
    head="all_final_layer.*",
    head_order="text last",
    once=(
        "noise_refiner.*",
        "context_refiner.*",
        "t_embedder",
        "cap_embedder",
        *_in("layers", "adaLN_modulation"),
    ),
    is_local=False,  # the noise refiner attends to the whole image
    refused={
        "siglip_feats": "with several images the text comes first, which is not known here",
        "image_noise_mask": "with several images the text comes first, which is not known here",
    },
)

KNOWN_PLANS: dict[str, PatchPlan] = {
    "CogVideoXTransformer3DModel": COGVIDEOX,
    "Flux2Transformer2DModel": FLUX_2,
    "FluxTransformer2DModel": FLUX,
    "HunyuanVideoTransformer3DModel": HUNYUAN_VIDEO,
    "LTXVideoTransformer3DModel": LTX,
    "PixArtTransformer2DModel": PIXART,
    "QwenImageTransformer2DModel": QWEN_IMAGE,
    "SD3Transformer2DModel": SD3,
    "WanTransformer3DModel": WAN,
    "ZImageTransformer2DModel": Z_IMAGE,
}

REFUSED_OPTIONS: dict[str, str] = {
    "ip_adapter_image_embeds": _IP,
    "ip_hidden_states": _IP,
    "ip_adapter_masks": _IP,
}
"""Entries of the dicts of attention arguments that cannot be given, and why."""
