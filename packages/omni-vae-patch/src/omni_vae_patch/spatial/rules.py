"""What is done with each kind of module, so that it is right on a shard of a feature map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state import Handle
from omni_vae_patch.attributes import put
from omni_vae_patch.spatial.attention import shard_attention, shard_linear_attention
from omni_vae_patch.spatial.convolutions import shard_convolution
from omni_vae_patch.spatial.interpolation import shard_upsample
from omni_vae_patch.spatial.local_modules import why_not_local
from omni_vae_patch.spatial.noise import shard_noise
from omni_vae_patch.spatial.norms import shard_group_norm
from omni_vae_patch.spatial.own_forward import check_forward, check_kept
from omni_vae_patch.spatial.padding import (
    PADS,
    pads_unusually,
    shard_pad,
    shard_unusually_padded,
)
from omni_vae_patch.spatial.pooling import check_power_pool, shard_adaptive_pool, shard_pool
from omni_vae_patch.spatial.region import Region
from omni_vae_patch.spatial.transposed import shard_transposed

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


# Of torch's modules, the first that fits; those that are not here are local, or refused.
_BY_CLASS: tuple[tuple[tuple[type[nn.Module], ...], Any], ...] = (
    ((nn.Conv2d, nn.Conv3d), shard_convolution),
    ((nn.GroupNorm,), shard_group_norm),
    ((nn.ConvTranspose2d, nn.ConvTranspose3d), shard_transposed),
    ((nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool2d, nn.MaxPool3d), shard_pool),
    ((nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), shard_adaptive_pool),
    ((nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), shard_adaptive_pool),
    ((nn.LPPool2d, nn.LPPool3d), check_power_pool),
    ((nn.Upsample,), shard_upsample),
    (PADS, shard_pad),
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


def register_rule(cls: type[nn.Module], rule: Rule) -> Handle:
    """Say what is to be done with modules of a class, and of its subclasses.

    One that overrides the ``forward`` of the class needs a rule of its own. A rule goes before what
    is known of a class otherwise; of several, the one of the nearest class counts. Modules within
    such a module have the rules of their own kinds, and where nothing is known of one, the rule
    answers for it.

    Args:
        cls: The class.
        rule: Changes a module so that it is right on a shard; `nothing_to_do` where it is. It is
            given the name, the module, and the `Region`, whose ``shard`` tells within a call what
            this rank holds and communicates with its peers. It returns what undoes the change.

    Returns:
        A handle that takes the rule back, for autoencoders that are made parallel afterwards, and
        puts back one that it replaced; also a context manager.

    Raises:
        ParallelConfigError: No class of modules, or nothing that can be called.
    """
    given: Any = cls
    if not (isinstance(given, type) and issubclass(given, nn.Module)):
        msg = f"a rule is registered for a class of modules, not for {cls!r}"
        raise ParallelConfigError(msg)
    if not callable(rule):
        msg = f"the rule for {cls.__name__} is {rule!r}; legal: a function (name, module, region)"
        raise ParallelConfigError(msg)
    before = _registered.get(cls)
    _registered[cls] = rule

    def undo() -> None:
        if _registered.get(cls) is not rule:
            return  # somebody has registered another one since
        if before is None:
            del _registered[cls]
        else:
            _registered[cls] = before

    return Handle(undo)


def rules_of(vae: nn.Module) -> list[tuple[str, nn.Module, Rule]]:
    """The rules for the modules of an autoencoder, with names and modules.

    Raises:
        ParallelConfigError: A module may mix positions, and nothing more is known of its kind.
    """
    found = []
    answered: list[str] = []
    for name, module in vae.named_modules():
        inside = any(name.startswith(prefix) for prefix in answered)
        if _registered_class(module) is not None:
            answered.append(f"{name}.")
        try:
            rule = rule_for(name, module)
        except ParallelConfigError:
            if not inside:
                raise
            continue
        if rule is not None:
            found.append((name, module, rule))
    return found


def _registered_class(module: nn.Module) -> type[nn.Module] | None:
    return next((cls for cls in type(module).__mro__ if cls in _registered), None)


def rule_for(name: str, module: nn.Module) -> Rule | None:
    """The rule of a module; ``None`` if only the modules within it count.

    Raises:
        ParallelConfigError: It may mix positions, and nothing more is known of its kind.
    """
    registered = _registered_class(module)
    if registered is not None:
        check_forward(name, module, registered)
        return _registered[registered]
    if type(getattr(module, "processor", None)).__name__ in _OVER_TIME:
        return None
    for cls in type(module).__mro__:
        if cls.__name__ in _BY_NAME and cls.__module__.startswith("diffusers."):
            check_forward(name, module, cls)
            return _BY_NAME[cls.__name__]
    for classes, rule in _BY_CLASS:
        for cls in classes:
            if isinstance(module, cls):
                check_forward(name, module, cls)
                return _padding_as_it_does(module, rule)
    why = why_not_local(module)
    if why is None:
        return None
    msg = (
        f"module {name!r} is a {type(module).__name__}, {why}; register a rule for its class "
        "(omni_vae_patch.register_rule), or use mode='tile'"
    )
    raise ParallelConfigError(msg)


def _padding_as_it_does(module: nn.Module, rule: Any) -> Rule:
    if isinstance(module, nn.Conv2d | nn.Conv3d) and pads_unusually(module):
        return shard_unusually_padded  # type: ignore[return-value]
    return rule  # type: ignore[no-any-return]


def apply_rule(name: str, module: nn.Module, rule: Rule, region: Region) -> Undo:
    """Apply a rule to a module.

    Raises:
        ParallelConfigError: The rule does not return what undoes it, or a forward that was put on
            this one module is lost by it.
    """
    before = vars(module).get("forward")
    undo = rule(name, module, region)
    if not callable(undo):
        said = getattr(rule, "__qualname__", type(rule).__qualname__)
        msg = (
            f"the rule {said} for module {name!r}, a {type(module).__name__}, returned {undo!r}; "
            "legal: a function without arguments that undoes what the rule did"
        )
        raise ParallelConfigError(msg)
    if rule not in _registered.values():  # a rule of the user's may call what was there
        check_kept(name, module, before, undo)
    return undo


__all__ = ["Rule", "Undo", "apply_rule", "nothing_to_do", "register_rule", "rule_for", "rules_of"]
