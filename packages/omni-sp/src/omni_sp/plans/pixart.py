"""PixArt: the image is split; text stays whole, for the cross-attention alone reads it."""

from omni_sp.plan_entries import (
    LOCAL_ATTENTION,
    SequenceParallelAttention,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)

PIXART: SequenceParallelModelPlan = {
    "transformer_blocks.0": {
        "hidden_states": SequenceParallelInput(1, expected_dims=3, attends=True),
    },
    # The model expects a mask of as many keys as it holds; attention gathers them.
    "transformer_blocks.*": {
        "attention_mask": SequenceParallelInput(-1, expected_dims=3, like="hidden_states"),
    },
    "transformer_blocks.*.attn1": SequenceParallelAttention(("hidden_states",)),
    "transformer_blocks.*.attn2": LOCAL_ATTENTION,
    "proj_out": SequenceParallelOutput(1, expected_dims=3, like="hidden_states"),
}
