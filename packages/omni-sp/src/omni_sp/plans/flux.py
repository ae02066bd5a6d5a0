"""Flux and its kin (Flux2, Chroma, Bria): text and image tokens attend jointly in every block.

So both are split, and with them what a ControlNet adds to the image tokens. Chroma's mask is of
the whole sequence of text and image, and attention takes it so.
"""

from omni_sp.plan_entries import (
    SequenceParallelAttention,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
    SequenceParallelRefusal,
)

_RESIDUALS = SequenceParallelInput(1, expected_dims=3, like="hidden_states")
_CACHE = SequenceParallelRefusal(
    "its cache holds the keys of reference images, which lie before the image's and are not split; "
    "call the model without it, with the reference tokens in every step"
)
_JOINT = SequenceParallelAttention(("encoder_hidden_states", "hidden_states"))

FLUX: SequenceParallelModelPlan = {
    "": {
        "hidden_states": SequenceParallelInput(1, expected_dims=3, attends=True),
        "encoder_hidden_states": SequenceParallelInput(1, expected_dims=3, attends=True),
        "img_ids": SequenceParallelInput(-2, like="hidden_states"),
        "txt_ids": SequenceParallelInput(-2, like="encoder_hidden_states"),
        "controlnet_block_samples?": _RESIDUALS,
        "controlnet_single_block_samples?": _RESIDUALS,
        "kv_cache_mode?": _CACHE,  # of Flux2
    },
    "transformer_blocks.*.attn": _JOINT,
    "single_transformer_blocks.*.attn": _JOINT,
    "proj_out": SequenceParallelOutput(1, expected_dims=3, like="hidden_states"),
}
