"""Weights that diffusers' layerwise casting stores in less than it computes in."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_HOOK = "layerwise_casting"


def cast_without_content(network: nn.Module) -> None:
    """Give modules with casting hooks weights without content, as during their call.

    A hook casts a module in place, which weights with content do not survive where nothing is
    computed. To be called there, where `attributes_kept` puts back what the modules had.
    """
    for module in network.modules():
        registry: Any = getattr(module, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook(_HOOK)
        if hook is None:
            continue
        for inner in module.modules():
            for name, weight in inner._parameters.items():
                if weight is not None:
                    empty = torch.empty_like(weight, dtype=hook.compute_dtype)
                    inner._parameters[name] = nn.Parameter(empty, requires_grad=False)
        vars(module)["to"] = lambda *_, module=module, **__: module
