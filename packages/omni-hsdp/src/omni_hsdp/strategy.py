"""Sharded weights as a strategy that the umbrella package can find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from omni_group_coordinator import ParallelConfigError
from omni_hsdp.hsdp import ShardedHandle, apply_hsdp_to_model
from omni_hsdp.hsdp_config import HSDPInferenceConfig
from omni_parallel_state import Handle, ParallelState
from omni_parallel_state.denoising.names import DENOISERS
from omni_parallel_state.strategy_options import config_with

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
"""Attributes of pipelines that hold a text encoder."""


class HSDPStrategy:
    """Shards weights over the ``fs`` group of a state."""

    name = "hsdp"

    def apply(
        self,
        target: Any,
        state: ParallelState,
        *,
        components: Sequence[str] = (),
        text_encoders: bool = False,
        **options: Any,
    ) -> Handle:
        """Shard a module, or modules of a pipeline.

        Weights are gathered in the dtype that they have, unless an option says otherwise.

        Args:
            target: The module or pipeline.
            state: The ranks; its layout has the sizes.
            components: Which modules of a pipeline; default: those that predict noise.
            text_encoders: Shard the text encoders of a pipeline too, as many as it has. The
                pipeline must only call them.
            options: Other fields of `HSDPInferenceConfig`.

        Raises:
            ParallelConfigError: The target has no such module, or one is sharded already; or an
                option is none.
        """
        layout = state.layout
        sizes = (layout.replicate, layout.fs) if layout.fs > 1 else (layout.world_size, 1)
        given = {"enabled": True, "hsdp_replicate_size": sizes[0], "hsdp_shard_size": sizes[1]}
        options = {"param_dtype": None, **options}
        config = config_with(HSDPInferenceConfig, options, **given)
        done: list[nn.Module] = []
        try:
            for module in _modules(target, components, text_encoders):
                apply_hsdp_to_model(module, config, state=state)
                done.append(module)
        except BaseException:
            ShardedHandle(done).remove()
            raise
        return ShardedHandle(done)


def _modules(target: Any, components: Sequence[str], text_encoders: bool) -> list[nn.Module]:
    if isinstance(target, nn.Module):
        return [target]
    names = (components,) if isinstance(components, str) else tuple(components) or DENOISERS
    found = {name: getattr(target, name, None) for name in names}
    modules = [module for module in found.values() if isinstance(module, nn.Module)]
    if not modules or (components and len(modules) < len(names)):
        here = [
            name
            for name, value in getattr(target, "__dict__", {}).items()
            if isinstance(value, nn.Module)
        ]
        msg = (
            f"{type(target).__name__} lacks a module among {', '.join(names)}; its modules: "
            f"{', '.join(sorted(here)) or 'none'}. Pass the module itself"
        )
        raise ParallelConfigError(msg)
    if text_encoders:
        encoders = [getattr(target, name, None) for name in TEXT_ENCODERS]
        modules += [module for module in encoders if isinstance(module, nn.Module)]
    return list(dict.fromkeys(modules))


strategy = HSDPStrategy()
"""The object that the entry point ``omni_parallel.v1.strategies: hsdp`` names."""
