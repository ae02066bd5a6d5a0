"""CogVideoX: text and video attend jointly in every block, so both are split.

From the first block on: before it the model embeds patches and adds positions to the whole.
"""

from omni_sp.plan_entries import (
    SequenceParallelAttention,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)

_ROTARY = SequenceParallelInput(0, expected_dims=2, like="hidden_states")

COGVIDEOX: SequenceParallelModelPlan = {
    "transformer_blocks.0": {
        "hidden_states": SequenceParallelInput(1, expected_dims=3, attends=True),
        "encoder_hidden_states": SequenceParallelInput(1, expected_dims=3, attends=True),
    },
    "transformer_blocks.*": {"image_rotary_emb": (_ROTARY, _ROTARY)},
    "transformer_blocks.*.attn1": SequenceParallelAttention(
        ("encoder_hidden_states", "hidden_states")
    ),
    "proj_out": SequenceParallelOutput(1, expected_dims=3, like="hidden_states"),
}
