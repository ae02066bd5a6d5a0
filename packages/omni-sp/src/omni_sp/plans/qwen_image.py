"""Qwen-Image: text and image tokens attend jointly in every block, so both are split.

The text is split at the first block, for the model counts its tokens before. Its mask is split
too, since the blocks put it together with one of the image.
"""

from omni_sp.plan_entries import (
    SequenceParallelAttention,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)

_IMAGE, _TEXT = "hidden_states", "encoder_hidden_states"
_MASK = "encoder_hidden_states_mask"

QWEN_IMAGE: SequenceParallelModelPlan = {
    "": {
        _IMAGE: SequenceParallelInput(1, expected_dims=3, attends=True),
        "controlnet_block_samples": SequenceParallelInput(1, expected_dims=3, like=_IMAGE),
    },
    "pos_embed": {
        0: SequenceParallelInput(0, expected_dims=2, split_output=True, like=_IMAGE),
        # The text's, which is split later and in the same way.
        1: SequenceParallelInput(0, expected_dims=2, split_output=True),
    },
    "transformer_blocks.0": {_TEXT: SequenceParallelInput(1, expected_dims=3, attends=True)},
    "transformer_blocks.*": {
        _MASK: SequenceParallelInput(1, expected_dims=2, like=_TEXT),
        "modulate_index": SequenceParallelInput(1, expected_dims=2, like=_IMAGE),
    },
    "transformer_blocks.*.attn": SequenceParallelAttention((_TEXT, _IMAGE), masks={_TEXT: _MASK}),
    "proj_out": SequenceParallelOutput(1, expected_dims=3, like=_IMAGE),
}
