"""Sana: the image is split in units of rows, which the feed-forward's convolution needs.

Its self-attention is linear: what sums over the tokens, one small matrix for each head, is summed
over the ranks. Text stays whole, for the cross-attention alone reads it.
"""

from omni_sp.plan_entries import (
    LOCAL_ATTENTION,
    SequenceParallelAttention,
    SequenceParallelConvolution,
    SequenceParallelCount,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)

SANA: SequenceParallelModelPlan = {
    # Of a ControlNet, for the image tokens, which are split later and in the same way: in rows,
    # as wide as the latents (every published model has patches of one).
    "": {
        "controlnet_block_samples?": SequenceParallelInput(1, expected_dims=3, unit="hidden_states")
    },
    "transformer_blocks.0": {
        "hidden_states": SequenceParallelInput(1, expected_dims=3, attends=True, unit="width"),
    },
    "transformer_blocks.*": {
        "height": SequenceParallelCount(like="hidden_states", unit="width"),
    },
    "transformer_blocks.*.attn1": SequenceParallelAttention(("hidden_states",), kind="linear"),
    "transformer_blocks.*.attn2": LOCAL_ATTENTION,
    "transformer_blocks.*.ff.conv_depth": SequenceParallelConvolution(like="hidden_states"),
    "proj_out": SequenceParallelOutput(1, expected_dims=3, like="hidden_states"),
}
