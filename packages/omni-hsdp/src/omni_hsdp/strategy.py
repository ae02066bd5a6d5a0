"""Sharded weights as a strategy that the umbrella package can find."""

from __future__ import annotations

from typing import Any

from torch import nn

from omni_group_coordinator import ParallelConfigError
from omni_hsdp.hsdp import ShardedHandle, apply_hsdp_to_model
from omni_hsdp.hsdp_config import HSDPInferenceConfig
from omni_parallel_state import Handle, ParallelState
from omni_parallel_state.denoising.names import DENOISERS

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
"""Attributes of pipelines that hold a text encoder."""


class HSDPStrategy:
    """Shards weights over the ``fs`` group of a state.

    Args:
        components: Which modules of a pipeline; default: those that predict noise.
        text_encoders: Shard the text encoders of a pipeline too, as many as it has. The pipeline
            must only call them.
    """

    name = "hsdp"

    def __init__(self, components: tuple[str, ...] = (), *, text_encoders: bool = False) -> None:
        self.components = components
        self.text_encoders = text_encoders

    def apply(self, target: Any, state: ParallelState) -> Handle:
        """Shard a module, or modules of a pipeline: those that predict noise, or those asked for.

        Weights are gathered in the dtype that they have.

        Raises:
            ParallelConfigError: The target has no such module, or one is sharded already.
        """
        layout = state.layout
        sizes = (layout.replicate, layout.fs) if layout.fs > 1 else (layout.world_size, 1)
        config = HSDPInferenceConfig(True, *sizes, param_dtype=None)
        done: list[nn.Module] = []
        try:
            for module in self._modules(target):
                apply_hsdp_to_model(module, config, state=state)
                done.append(module)
        except BaseException:
            ShardedHandle(done).remove()
            raise
        return ShardedHandle(done)

    def _modules(self, target: Any) -> list[nn.Module]:
        if isinstance(target, nn.Module):
            return [target]
        names = self.components or DENOISERS
        found = {name: getattr(target, name, None) for name in names}
        modules = [module for module in found.values() if isinstance(module, nn.Module)]
        if not modules or (self.components and len(modules) < len(names)):
            here = [name for name, value in vars(target).items() if isinstance(value, nn.Module)]
            msg = (
                f"{type(target).__name__} lacks a module among {', '.join(names)}; its modules: "
                f"{', '.join(sorted(here)) or 'none'}. Pass the module itself"
            )
            raise ParallelConfigError(msg)
        if self.text_encoders:
            encoders = [getattr(target, name, None) for name in TEXT_ENCODERS]
            modules += [module for module in encoders if isinstance(module, nn.Module)]
        return list(dict.fromkeys(modules))


strategy = HSDPStrategy()
"""The object that the entry point ``omni_parallel.v1.strategies: hsdp`` names."""
