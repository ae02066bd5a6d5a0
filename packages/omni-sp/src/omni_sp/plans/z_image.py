"""Z-Image: the blocks' one sequence of image and text is split; before it, the image alone.

Image and text of each sample are put together between the refining blocks and the others, so
there the image is whole. Its text (and SigLIP) tokens, few, are refined by every rank. Masks are
of the whole sequence, and attention takes them so.
"""

from omni_sp.plan_entries import (
    LOCAL_ATTENTION,
    InputPlan,
    SequenceParallelAttention,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)

_STREAM: InputPlan = {"x": SequenceParallelInput(1, expected_dims=3, attends=True)}
_NOISE_MASK = SequenceParallelInput(1, expected_dims=2, like="x")
_TOKENS: InputPlan = {
    "freqs_cis": SequenceParallelInput(1, expected_dims=3, like="x"),
    "noise_mask": _NOISE_MASK,
}
_ATTENTION = SequenceParallelAttention(("x",))
_GATHERED = SequenceParallelOutput(1, expected_dims=3, like="x")

Z_IMAGE: SequenceParallelModelPlan = {
    # Of a ControlNet, for the joint sequence, which is split later and in the same way.
    "": {"controlnet_block_samples?": SequenceParallelInput(1, expected_dims=3)},
    "noise_refiner.0": _STREAM,
    "noise_refiner.*": _TOKENS,
    "noise_refiner.*.attention": _ATTENTION,
    "noise_refiner.-1": _GATHERED,
    "context_refiner.*.attention": LOCAL_ATTENTION,
    "layers.0": _STREAM,
    "layers.*": _TOKENS,
    "layers.*.attention": _ATTENTION,
    "all_final_layer.*": {"noise_mask": _NOISE_MASK},
    "all_final_layer.*.linear": _GATHERED,
}
