"""HunyuanVideo and HunyuanVideo 1.5: video and text tokens attend jointly, so both are split.

They are split at the first block, after the text was refined as a whole. The mask of HunyuanVideo
is of the whole sequence, and attention takes it so; in 1.5 each attention makes one of the text's.
"""

from omni_sp.plan_entries import (
    LOCAL_ATTENTION,
    InputPlan,
    SequenceParallelAttention,
    SequenceParallelCount,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)

_VIDEO, _TEXT = "hidden_states", "encoder_hidden_states"
_TOKENS = SequenceParallelInput(1, expected_dims=3, attends=True)
# Before the tokens, and in the same way.
_ROTARY = SequenceParallelInput(0, expected_dims=2, split_output=True)
_JOINT = SequenceParallelAttention((_VIDEO, _TEXT))
# Of the first frame, where an image replaces it.
_FRAME: InputPlan = {"num_tokens?": SequenceParallelCount(like=_VIDEO)}

_COMMON: SequenceParallelModelPlan = {
    "rope": {0: _ROTARY, 1: _ROTARY},
    "context_embedder.token_refiner.refiner_blocks.*.attn": LOCAL_ATTENTION,
    "transformer_blocks.0": {_VIDEO: _TOKENS, _TEXT: _TOKENS},
    "proj_out": SequenceParallelOutput(1, expected_dims=3, like=_VIDEO),
}

HUNYUAN_VIDEO: SequenceParallelModelPlan = {
    **_COMMON,
    "transformer_blocks.*": _FRAME,
    "single_transformer_blocks.*": _FRAME,
    "transformer_blocks.*.attn": _JOINT,
    "single_transformer_blocks.*.attn": _JOINT,
}

HUNYUAN_VIDEO15: SequenceParallelModelPlan = {
    **_COMMON,
    "transformer_blocks.*": {
        "attention_mask": SequenceParallelInput(1, expected_dims=2, like=_TEXT)
    },
    "transformer_blocks.*.attn": SequenceParallelAttention(
        (_VIDEO, _TEXT), masks={_TEXT: "attention_mask"}
    ),
}
