"""Plans of model families, one file for each; by name of the class, so that none is imported."""

from omni_sp.plan_entries import SequenceParallelModelPlan
from omni_sp.plans.auraflow import AURAFLOW
from omni_sp.plans.cogvideox import COGVIDEOX
from omni_sp.plans.flux import FLUX
from omni_sp.plans.hidream import HIDREAM
from omni_sp.plans.hunyuan_video import HUNYUAN_VIDEO, HUNYUAN_VIDEO15
from omni_sp.plans.ltx import LTX
from omni_sp.plans.ltx2 import LTX2
from omni_sp.plans.lumina2 import LUMINA2
from omni_sp.plans.mochi import MOCHI
from omni_sp.plans.pixart import PIXART
from omni_sp.plans.qwen_image import QWEN_IMAGE
from omni_sp.plans.sana import SANA
from omni_sp.plans.sd3 import SD3
from omni_sp.plans.wan import WAN, WAN_VACE
from omni_sp.plans.z_image import Z_IMAGE

KNOWN_PLANS: dict[str, SequenceParallelModelPlan] = {
    "AuraFlowTransformer2DModel": AURAFLOW,
    "BriaTransformer2DModel": FLUX,
    "ChromaTransformer2DModel": FLUX,
    "CogVideoXTransformer3DModel": COGVIDEOX,
    "Flux2Transformer2DModel": FLUX,
    "FluxTransformer2DModel": FLUX,
    "HiDreamImageTransformer2DModel": HIDREAM,
    "HunyuanVideo15Transformer3DModel": HUNYUAN_VIDEO15,
    "HunyuanVideoTransformer3DModel": HUNYUAN_VIDEO,
    "LTX2VideoTransformer3DModel": LTX2,
    "LTXVideoTransformer3DModel": LTX,
    "Lumina2Transformer2DModel": LUMINA2,
    "MochiTransformer3DModel": MOCHI,
    "PixArtTransformer2DModel": PIXART,
    "QwenImageTransformer2DModel": QWEN_IMAGE,
    "SD3Transformer2DModel": SD3,
    "SanaTransformer2DModel": SANA,
    "WanTransformer3DModel": WAN,
    "WanVACETransformer3DModel": WAN_VACE,
    "ZImageTransformer2DModel": Z_IMAGE,
}

__all__ = ["KNOWN_PLANS"]
