"""What is done with each kind of module, so that it is right on a shard of a feature map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from omni_group_coordinator import ParallelConfigError
from omni_vae_patch.attributes import put
from omni_vae_patch.spatial.attention import shard_attention, shard_linear_attention
from omni_vae_patch.spatial.convolutions import shard_convolution
from omni_vae_patch.spatial.noise import shard_noise
from omni_vae_patch.spatial.norms import shard_group_norm
from omni_vae_patch.spatial.region import Region

Undo = Callable[[], None]
Rule = Callable[[str, nn.Module, Region], Undo]
"""Changes a module, given its name and the region, and returns what undoes that."""


def nothing_to_do(name: str, module: nn.Module, region: Region) -> Undo:
    """The rule of modules that treat each position by itself."""
    return lambda: None


def _convolve_at_once(name: str, module: nn.Module, region: Region) -> Undo:
    """CogVideoX cuts large inputs into pieces, how many depends on the shard: not with shards.

    The pieces would be as many exchanges, and not as many on every rank.
    """
    undo = shard_convolution(name, module, region)  # type: ignore[arg-type]
    original = module.forward

    def forward(x: Tensor) -> Any:
        at_once: Any = nn.Conv3d.forward
        return original(x) if region.shard is None else at_once(module, x)

    undo_forward = put(module, "forward", forward)

    def undo_both() -> None:
        undo_forward()
        undo()

    return undo_both


_LOCAL: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.BatchNorm2d,  # in eval mode, with statistics of its own
    nn.BatchNorm3d,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Embedding,
    nn.Dropout,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.Identity,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.Conv1d,  # over time, of diffusers' autoencoders
    nn.ZeroPad2d,  # before a convolution, which knows of it
    nn.SiLU,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.GELU,
    nn.ELU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Hardswish,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Sequential,
    nn.ParameterList,
)

# By the name of the class: what its own code does, beside that of the modules within it.
_BY_NAME: dict[str, Rule] = {
    "Attention": shard_attention,
    "WanAttentionBlock": shard_attention,
    "QwenImageAttentionBlock": shard_attention,
    "HunyuanImageAttentionBlock": shard_attention,
    "HunyuanVideo15AttnBlock": shard_attention,
    "HunyuanImageRefinerAttnBlock": shard_attention,
    "SanaMultiscaleLinearAttention": shard_linear_attention,
    "CosmosCausalAttention": shard_attention,
    "QwenImage21AttentionBlock": shard_attention,
    "CogVideoXSafeConv3d": _convolve_at_once,
    "LTXVideoResnetBlock3d": shard_noise,
    "LTX2VideoResnetBlock3d": shard_noise,
}

# Processors that attend over time, of each position by itself.
_OVER_TIME = ("MochiVaeAttnProcessor2_0", "CosmosTemporalAttentionProcessor2_0")

_registered: dict[type[nn.Module], Rule] = {}


def register_rule(cls: type[nn.Module], rule: Rule) -> None:
    """Say what is to be done with modules of a class, and of its subclasses.

    Args:
        cls: The class.
        rule: Changes a module so that it is right on a shard; `nothing_to_do` where it is. It is
            given the name, the module, and the `Region`, whose ``shard`` tells within a call what
            this rank holds and communicates with its peers.
    """
    _registered[cls] = rule


def rule_for(name: str, module: nn.Module) -> Rule | None:
    """The rule of a module; ``None`` if only the modules within it count.

    Raises:
        ParallelConfigError: It has none within it, and nothing is known of its kind.
    """
    if type(getattr(module, "processor", None)).__name__ in _OVER_TIME:
        return None
    for cls in type(module).__mro__:
        if cls in _registered:
            return _registered[cls]
        if cls.__name__ in _BY_NAME and cls.__module__.startswith("diffusers."):
            return _BY_NAME[cls.__name__]
    if isinstance(module, nn.GroupNorm):
        return shard_group_norm  # type: ignore[return-value]
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return shard_convolution  # type: ignore[return-value]
    if isinstance(module, _LOCAL) or _is_nearest(module) or not _is_of_torch(module):
        return None
    msg = (
        f"module {name!r} is a {type(module).__name__}, of which it is not known how it mixes "
        "positions in space; register a rule for its class (omni_vae_patch.register_rule), or use "
        "mode='tile'"
    )
    raise ParallelConfigError(msg)


def _is_nearest(module: nn.Module) -> bool:
    return isinstance(module, nn.Upsample) and module.mode in ("nearest", "nearest-exact")


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


__all__ = ["Rule", "nothing_to_do", "register_rule", "rule_for"]
