"""Stable Diffusion 3 and 3.5: text and image tokens attend jointly in every block, both are split.

They are split as the embedders give them, so that any block may be skipped. Some blocks of 3.5 have
a second attention, of the image tokens alone.
"""

from omni_sp.plan_entries import (
    SequenceParallelAttention,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)

_IMAGE, _TEXT = "pos_embed.0", "context_embedder.0"
_TOKENS = SequenceParallelInput(1, expected_dims=3, attends=True, split_output=True)

SD3: SequenceParallelModelPlan = {
    # Of a ControlNet, for the image tokens, which are split later and in the same way.
    "": {"block_controlnet_hidden_states": SequenceParallelInput(1, expected_dims=3)},
    "pos_embed": {0: _TOKENS},
    "context_embedder": {0: _TOKENS},
    "transformer_blocks.*.attn": SequenceParallelAttention((_IMAGE, _TEXT)),
    "transformer_blocks.*.attn2?": SequenceParallelAttention((_IMAGE,)),
    "proj_out": SequenceParallelOutput(1, expected_dims=3, like=_IMAGE),
}
