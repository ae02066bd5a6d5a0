"""Mochi: the video is split, from the first block on.

Attention takes of each sample's text the valid tokens alone, so every rank holds all text.
"""

from omni_sp.plan_entries import (
    LOCAL_ATTENTION,
    REST,
    SequenceParallelAttention,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)

_ROTARY = SequenceParallelInput(0, expected_dims=3, like="hidden_states")

MOCHI: SequenceParallelModelPlan = {
    "time_embed.pooler": LOCAL_ATTENTION,
    "transformer_blocks.0": {
        "hidden_states": SequenceParallelInput(1, expected_dims=3, attends=True),
    },
    "transformer_blocks.*": {"image_rotary_emb": (_ROTARY, _ROTARY)},
    "transformer_blocks.*.attn1": SequenceParallelAttention(("hidden_states", REST)),
    "proj_out": SequenceParallelOutput(1, expected_dims=3, like="hidden_states"),
}
