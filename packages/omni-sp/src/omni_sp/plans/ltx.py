"""LTX-Video: the video is split; its text stays whole, for the cross-attention alone reads it.

A timestep for each token is split as the video is, so that the final modulation fits.
"""

from omni_sp.plan_entries import (
    LOCAL_ATTENTION,
    SequenceParallelAttention,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)

_ROTARY = SequenceParallelInput(1, expected_dims=3, like="hidden_states", split_output=True)

LTX: SequenceParallelModelPlan = {
    "": {
        "hidden_states": SequenceParallelInput(1, expected_dims=3, attends=True),
        "timestep": SequenceParallelInput(1, like="hidden_states", if_dims=2),
    },
    "rope": {0: _ROTARY, 1: _ROTARY},
    "transformer_blocks.*.attn1": SequenceParallelAttention(("hidden_states",)),
    "transformer_blocks.*.attn2": LOCAL_ATTENTION,
    "proj_out": SequenceParallelOutput(1, expected_dims=3, like="hidden_states"),
}
