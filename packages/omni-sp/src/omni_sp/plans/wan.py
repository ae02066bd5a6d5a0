"""Wan and Wan-VACE: the video tokens are split; text and image conditions stay whole.

Cross-attention alone reads these. Timesteps for each token, as those of Wan 2.2, are split as the
tokens are. VACE's control tokens, which pass blocks of their own first, lie as the video's.
"""

from omni_sp.plan_entries import (
    LOCAL_ATTENTION,
    SequenceParallelAttention,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)

_VIDEO = "hidden_states"
_TOKENS = SequenceParallelInput(1, expected_dims=3, attends=True)
# Before the tokens, and in the same way.
_ROTARY = SequenceParallelInput(1, expected_dims=4, split_output=True)
_ATTENTION = SequenceParallelAttention((_VIDEO,))

_BLOCKS: SequenceParallelModelPlan = {
    "rope": {0: _ROTARY, 1: _ROTARY},
    "blocks.0": {_VIDEO: _TOKENS},
    "blocks.*.attn1": _ATTENTION,
    "blocks.*.attn2": LOCAL_ATTENTION,
    "proj_out": SequenceParallelOutput(1, expected_dims=3, like=_VIDEO),
}

WAN: SequenceParallelModelPlan = {
    "": {"timestep": SequenceParallelInput(1, if_dims=2)},
    **_BLOCKS,
}

WAN_VACE: SequenceParallelModelPlan = {
    "vace_blocks.0": {
        _VIDEO: _TOKENS,
        "control_hidden_states": SequenceParallelInput(1, expected_dims=3, like=_VIDEO),
    },
    "vace_blocks.*.attn1": _ATTENTION,
    "vace_blocks.*.attn2": LOCAL_ATTENTION,
    **_BLOCKS,
}
