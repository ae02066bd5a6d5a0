"""HiDream: the image is split; text stays whole, since each block is given further text."""

from omni_sp.plan_entries import (
    REST,
    SequenceParallelAttention,
    SequenceParallelConcatInput,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)

_IMAGE_AND_TEXT = ("hidden_states", REST)
_ATTENTION = SequenceParallelAttention(_IMAGE_AND_TEXT)
_ROTARY = SequenceParallelConcatInput(1, _IMAGE_AND_TEXT, expected_dims=6)

HIDREAM: SequenceParallelModelPlan = {
    "double_stream_blocks.0": {
        "hidden_states": SequenceParallelInput(1, expected_dims=3, attends=True),
    },
    # A mask is a factor of the keys, not one of attention.
    "double_stream_blocks.*": {
        "hidden_states_masks": SequenceParallelInput(1, expected_dims=2, like="hidden_states"),
        "image_rotary_emb": _ROTARY,
    },
    "single_stream_blocks.*": {
        "hidden_states_masks": SequenceParallelConcatInput(1, _IMAGE_AND_TEXT, expected_dims=2),
        "image_rotary_emb": _ROTARY,
    },
    "double_stream_blocks.*.block.attn1": _ATTENTION,
    "single_stream_blocks.*.block.attn1": _ATTENTION,
    "final_layer": SequenceParallelOutput(1, expected_dims=3, like="hidden_states"),
}
