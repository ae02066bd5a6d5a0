"""What the strategies know of pipelines."""

from __future__ import annotations

_TRANSFORMERS = ("transformer", "transformer_2", "unconditional_transformer")

DENOISERS = (*_TRANSFORMERS, "unet", "prior", "decoder")
"""Components of diffusers' pipelines that predict noise, where they are modules."""
