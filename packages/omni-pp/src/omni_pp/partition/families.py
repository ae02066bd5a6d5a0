"""What is known of model families, as data: their trunks, and what cannot be cut in them."""

from __future__ import annotations

USUAL_NAMES = (
    "transformer_blocks",
    "single_transformer_blocks",
    "joint_transformer_blocks",
    "blocks",
    "layers",
    "double_blocks",
    "single_blocks",
    "double_stream_blocks",
    "single_stream_blocks",
    "visual_transformer_blocks",
)
"""What the lists of a model's trunk are called; anything else is cut only where it stands alone."""

_TRANSFORMER = ("transformer_blocks",)
_DOUBLE_SINGLE = ("transformer_blocks", "single_transformer_blocks")

VERIFIED: dict[str, tuple[str, ...]] = {
    "AllegroTransformer3DModel": _TRANSFORMER,
    "AuraFlowTransformer2DModel": ("joint_transformer_blocks", "single_transformer_blocks"),
    "CogVideoXTransformer3DModel": _TRANSFORMER,
    "Flux2Transformer2DModel": _DOUBLE_SINGLE,
    "FluxTransformer2DModel": _DOUBLE_SINGLE,
    "HunyuanImageTransformer2DModel": _DOUBLE_SINGLE,
    "HunyuanVideoTransformer3DModel": _DOUBLE_SINGLE,
    "LTX2VideoTransformer3DModel": _TRANSFORMER,
    "LTXVideoTransformer3DModel": _TRANSFORMER,
    "Lumina2Transformer2DModel": ("layers",),
    "MochiTransformer3DModel": _TRANSFORMER,
    "PixArtTransformer2DModel": _TRANSFORMER,
    "QwenImageTransformer2DModel": _TRANSFORMER,
    "SD3Transformer2DModel": _TRANSFORMER,
    "SanaTransformer2DModel": _TRANSFORMER,
    "WanTransformer3DModel": ("blocks",),
    "ZImageTransformer2DModel": ("layers",),
}
"""Classes of diffusers whose forward was read, with the lists of its trunk in order of execution.

Other lists of these models (the refiners of Z-Image and Lumina 2, those within an embedder) belong
to what each chunk runs again.
"""

REFUSED: dict[str, str] = {
    "ChromaTransformer2DModel": "its forward takes each block's modulation by the block's position",
    "HiDreamImageTransformer2DModel": "its forward takes each block's text by the block's position",
    "HunyuanDiT2DModel": "it is U-shaped: late blocks take what early blocks gave",
    "UVit2DModel": "it is U-shaped: late blocks take what early blocks gave",
    "WanAnimateTransformer3DModel": "its face adapter is a second stream beside the blocks",
    "WanAnimate2Transformer3DModel": "its adapters are a second stream beside the blocks",
    "WanVACETransformer3DModel": "its VACE blocks are a second stream beside the blocks",
}
"""Classes that this mechanism cannot cut, and why, in better words than analysis finds."""

_RESIDUALS = "residuals of a ControlNet are added by the position of a block in its whole list"
_CHOSEN = "it chooses blocks by their position in the whole list"
_CACHED = "a cache is addressed by the position of a block in its whole list"

BLOCK_INDEXED_ARGUMENTS: dict[str, str] = {
    "block_controlnet_hidden_states": _RESIDUALS,
    "controlnet_block_samples": _RESIDUALS,
    "controlnet_blocks_repeat": _RESIDUALS,
    "controlnet_single_block_samples": _RESIDUALS,
    "controlnet_states": _RESIDUALS,
    "kv_cache": _CACHED,
    "kv_cache_mode": _CACHED,
    "kv_caches": _CACHED,
    "perturbation_mask": _CHOSEN,
    "skip_layer_mask": _CHOSEN,
    "skip_layers": _CHOSEN,
    "spatio_temporal_guidance_blocks": _CHOSEN,
}
"""Arguments of a forward that a chunk with fewer blocks would read wrongly, and why."""

SHARED_HOOKS = frozenset(
    {
        "FBCBlockHook",
        "FBCHeadBlockHook",
        "MagCacheBlockHook",
        "MagCacheHeadHook",
        "SeaCacheBlockHook",
        "SeaCacheLeaderBlockHook",
    }
)
"""Hooks of diffusers by which one block decides for the others, which are on other ranks here."""
