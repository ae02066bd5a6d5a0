"""Flux: text and image tokens attend jointly in every block, so both are split."""

from omni_sp.sp_plan import (
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)

FLUX: SequenceParallelModelPlan = {
    "": {
        "hidden_states": SequenceParallelInput(1, expected_dims=3, attends=True),
        "encoder_hidden_states": SequenceParallelInput(1, expected_dims=3, attends=True),
        "img_ids": SequenceParallelInput(0, expected_dims=2),
        "txt_ids": SequenceParallelInput(0, expected_dims=2),
    },
    "proj_out": SequenceParallelOutput(1, expected_dims=3, like="hidden_states"),
}
