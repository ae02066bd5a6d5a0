"""Lumina 2: the blocks' one sequence of text and image is split; before it, the image alone.

Text and image of each sample are put together between the refining blocks and the others, so
there the image is whole. Its text tokens, few, are refined by every rank. The mask of padded
texts is of the whole sequence, and attention takes it so.
"""

from omni_sp.plan_entries import (
    LOCAL_ATTENTION,
    InputPlan,
    SequenceParallelAttention,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)

_STREAM: InputPlan = {"hidden_states": SequenceParallelInput(1, expected_dims=3, attends=True)}
_ROTARY: InputPlan = {
    "image_rotary_emb": SequenceParallelInput(1, expected_dims=3, like="hidden_states"),
}
_ATTENTION = SequenceParallelAttention(("hidden_states",))
_GATHERED = SequenceParallelOutput(1, expected_dims=3, like="hidden_states")

LUMINA2: SequenceParallelModelPlan = {
    "context_refiner.*.attn": LOCAL_ATTENTION,
    "noise_refiner.0": _STREAM,
    "noise_refiner.*": _ROTARY,
    "noise_refiner.*.attn": _ATTENTION,
    "noise_refiner.-1": _GATHERED,
    "layers.0": _STREAM,
    "layers.*": _ROTARY,
    "layers.*.attn": _ATTENTION,
    "norm_out": _GATHERED,
}
