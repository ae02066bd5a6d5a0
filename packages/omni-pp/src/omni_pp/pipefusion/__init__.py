"""Patches of one image that follow each other through the stages, with keys of the step before."""

from omni_pp.pipefusion.application import PipeFusionHandle, apply_pipefusion
from omni_pp.pipefusion.pipefusion_config import PipeFusionConfig

__all__ = ["PipeFusionConfig", "PipeFusionHandle", "apply_pipefusion"]
