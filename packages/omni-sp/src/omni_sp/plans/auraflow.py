"""AuraFlow: text and image tokens attend jointly in every block, so both are split.

They are split at the first block; the register tokens are among the text's.
"""

from omni_sp.plan_entries import (
    SequenceParallelAttention,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)

_IMAGE, _TEXT = "hidden_states", "encoder_hidden_states"
_TOKENS = SequenceParallelInput(1, expected_dims=3, attends=True)
_JOINT = SequenceParallelAttention((_TEXT, _IMAGE))

AURAFLOW: SequenceParallelModelPlan = {
    "joint_transformer_blocks.0": {_IMAGE: _TOKENS, _TEXT: _TOKENS},
    "joint_transformer_blocks.*.attn": _JOINT,
    "single_transformer_blocks.*.attn": _JOINT,
    "proj_out": SequenceParallelOutput(1, expected_dims=3, like=_IMAGE),
}
