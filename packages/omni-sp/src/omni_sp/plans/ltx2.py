"""LTX-2: video and audio are two streams, both split, which attend to themselves and to each other.

Text stays whole, for cross-attention alone reads it. Timesteps for each token are split as their
stream is, so that the modulation, the final one too, fits.
"""

from omni_sp.plan_entries import (
    LOCAL_ATTENTION,
    SequenceParallelAttention,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)

_VIDEO, _AUDIO = "hidden_states", "audio_hidden_states"
# Dimension -2 is that of the tokens for both kinds of rotary embedding.
_VIDEO_ROTARY = SequenceParallelInput(-2, like=_VIDEO, split_output=True)
_AUDIO_ROTARY = SequenceParallelInput(-2, like=_AUDIO, split_output=True)

LTX2: SequenceParallelModelPlan = {
    "": {
        _VIDEO: SequenceParallelInput(1, expected_dims=3, attends=True),
        _AUDIO: SequenceParallelInput(1, expected_dims=3, attends=True),
        "timestep": SequenceParallelInput(1, like=_VIDEO, if_dims=2),
        "audio_timestep": SequenceParallelInput(1, like=_AUDIO, if_dims=2),
        # Its keys: the model expects as many as it holds, and attention gathers them.
        "video_self_attention_mask": SequenceParallelInput(2, expected_dims=3, like=_VIDEO),
        "video_keyframes_mask": SequenceParallelInput(1, expected_dims=3, like=_VIDEO),
    },
    "rope": {0: _VIDEO_ROTARY, 1: _VIDEO_ROTARY},
    "audio_rope": {0: _AUDIO_ROTARY, 1: _AUDIO_ROTARY},
    "cross_attn_rope": {0: _VIDEO_ROTARY, 1: _VIDEO_ROTARY},
    "cross_attn_audio_rope": {0: _AUDIO_ROTARY, 1: _AUDIO_ROTARY},
    "transformer_blocks.*.attn1": SequenceParallelAttention((_VIDEO,)),
    "transformer_blocks.*.audio_attn1": SequenceParallelAttention((_AUDIO,)),
    "transformer_blocks.*.attn2": LOCAL_ATTENTION,
    "transformer_blocks.*.audio_attn2": LOCAL_ATTENTION,
    "transformer_blocks.*.audio_to_video_attn": SequenceParallelAttention((_VIDEO,), (_AUDIO,)),
    "transformer_blocks.*.video_to_audio_attn": SequenceParallelAttention((_AUDIO,), (_VIDEO,)),
    "proj_out": SequenceParallelOutput(1, expected_dims=3, like=_VIDEO),
    "audio_proj_out": SequenceParallelOutput(1, expected_dims=3, like=_AUDIO),
}
