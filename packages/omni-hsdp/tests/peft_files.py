"""Adapters as the files that hold them, for tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out"]


def adapter_of(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """The file of an adapter for a Flux, which gets one in the making: pass a model of its own."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(seed)
    return {
        f"transformer.{key}": torch.randn(value.shape, generator=generator) * 0.1
        for key, value in get_peft_model_state_dict(model).items()
    }
