"""Plans of model families, one file for each; by name of the class, so that none is imported."""

from omni_sp.plans.flux import FLUX
from omni_sp.sp_plan import SequenceParallelModelPlan

KNOWN_PLANS: dict[str, SequenceParallelModelPlan] = {
    "FluxTransformer2DModel": FLUX,
}

__all__ = ["KNOWN_PLANS"]
