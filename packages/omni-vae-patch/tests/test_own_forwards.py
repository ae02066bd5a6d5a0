"""A forward that a rule would leave out is found by name, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_vaes import SmallVae, error, everyone, random, state_of, text_of
from stock_autoencoders import CASES, decoded
from torch import Tensor, nn
from torch.nn import functional

from omni_group_coordinator import ParallelConfigError
from omni_vae_patch import VaeParallelConfig, nothing_to_do, parallelize_vae, register_rule
from omni_vae_patch.spatial.geometry import geometry_of
from omni_vae_patch.spatial.rules import rules_of

EXACT = VaeParallelConfig("exact")
LATENT = random(1, 4, 7, 5)


class Isolated(nn.GroupNorm):
    """Statistics of the upper half alone."""

    def forward(self, x: Tensor) -> Tensor:
        half = x[..., : x.shape[-2] // 2, :]
        return (x - half.mean((1, 2, 3), keepdim=True)) * self.weight[:, None, None]


class Direct(nn.Conv2d):
    """Calls the operator by itself, and pads around."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(x, (1, 1, 1, 1), mode="circular")
        return functional.conv2d(x, self.weight, self.bias)


class Within(nn.Conv2d):
    """Overrides what rules replace."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x.flip(-2), weight, bias)


class Mixin:
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean())  # type: ignore[misc]


class Mixed(Mixin, nn.AvgPool2d):
    """Has its forward from a class beside torch's."""


class Further(nn.Upsample):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.roll(1, -2))


class Renamed(nn.GroupNorm):
    """Nothing of its own."""


OWN: dict[str, tuple[nn.Module, str]] = {
    "Isolated": (Isolated(2, 8), "a GroupNorm whose forward is that of Isolated"),
    "Direct": (Direct(8, 8, 3), "a Conv2d whose forward is that of Direct"),
    "Within": (Within(8, 8, 3, padding=1), "a Conv2d whose _conv_forward is that of Within"),
    "Mixed": (Mixed(1), "a AvgPool2d whose forward is that of Mixin"),
    "Further": (Further(scale_factor=1), "a Upsample whose forward is that of Further"),
}


def told() -> list[tuple[str, int, bool]]:
    found = []
    for module, _ in OWN.values():
        vae, ran = SmallVae(module), []
        hooks = [m.register_forward_hook(lambda *_, ran=ran: ran.append(1)) for m in vae.modules()]
        before = state_of(vae)
        text = text_of(lambda vae=vae: parallelize_vae(vae, EXACT, group=everyone()))
        found.append((text, len(ran), state_of(vae) == before))
        for hook in hooks:
            hook.remove()
    return found


def test_a_subclass_with_a_forward_of_its_own_is_named_before_anything_runs(ranks):
    for results in ranks.run(told):
        for (name, (_, why)), (text, ran, same) in zip(OWN.items(), results, strict=True):
            assert f"ParallelConfigError: module 'decoder.3' is a {name}, {why}" in text
            assert "register_rule" in text
            assert ran == 0
            assert same


class Gathering:
    """The rule of a module that is given the whole on every rank."""

    def __call__(self, name: str, module: Any, region: Any) -> Any:
        original = module.forward

        def forward(x: Tensor) -> Tensor:
            shard = region.shard
            if shard is None:
                return original(x)
            counts = shard.lengths(x.shape[shard.dim], name)
            whole = original(shard.gather(x, x.ndim + shard.dim, counts))
            return whole.narrow(shard.dim, sum(counts[: shard.rank]), x.shape[shard.dim])

        module.__dict__["forward"] = forward
        return lambda: module.__dict__.pop("forward")


class Base(nn.Module):
    """Whose forwards are those of the classes below."""


class Below(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def ruled() -> tuple[float, float, list[str]]:
    """By rules for the class itself, for one without forward, and for a parent."""
    group = everyone()
    off = []
    for module, cls, rule in (
        (Isolated(2, 8), Isolated, Gathering()),
        (Below(), Base, nothing_to_do),
    ):
        vae = SmallVae(module)
        alone = vae.decode(LATENT)
        with register_rule(cls, rule), parallelize_vae(vae, EXACT, group=group):
            off.append(error(vae.decode(LATENT), alone))
    with register_rule(nn.GroupNorm, Gathering()):
        above = text_of(lambda: parallelize_vae(SmallVae(Isolated(2, 8)), EXACT, group=group))
        inherits = SmallVae(Renamed(2, 8))
        same = text_of(lambda: parallelize_vae(inherits, EXACT, group=group).remove())
    return off[0], off[1], [above, same]


def test_a_rule_for_exactly_that_class_makes_it_work_and_one_for_its_parent_does_not(ranks):
    for own, without, (above, same) in ranks.run(ruled):
        assert max(own, without) <= 1e-5
        assert "a GroupNorm whose forward is that of Isolated" in above
        assert same == "none"


def on_one_module() -> tuple[str, str, bool]:
    """A forward that somebody has put on one norm, and on one convolution that goes on to it."""
    vae = SmallVae()
    norm, first = vae.decoder[1], vae.decoder[0]
    kept = norm.forward
    norm.forward = lambda x: kept(x) + x.mean()
    before = dict(vars(norm))
    text = text_of(lambda: parallelize_vae(vae, EXACT, group=everyone()))
    same = dict(vars(norm)) == before
    del norm.forward
    convolve = first.forward
    first.forward = lambda x: convolve(x * 2)
    alone = vae.decode(LATENT)
    with parallelize_vae(vae, EXACT, group=everyone()):
        off = error(vae.decode(LATENT), alone)
    return text, f"{off <= 1e-5}", same


def test_a_forward_on_one_module_is_not_left_out(ranks):
    for text, right, same in ranks.run(on_one_module):
        assert "ParallelConfigError: module 'decoder.1', a GroupNorm, has a forward of its" in text
        assert "call parallelize_vae first" in text
        assert right == "True"
        assert same


@pytest.mark.parametrize("name", CASES)
def test_of_stock_autoencoders_every_module_is_understood(name):
    case = CASES[name]
    vae = case.build()
    assert rules_of(vae)
    # Mochi's encoder adds channels to those of a sample.
    known = None if name == "mochi" else case.sample(2, 2, 0).shape[1]
    assert geometry_of(vae).sample_channels == known


# -- layerwise casting -------------------------------------------------------------------------


@torch.no_grad()
def cast(name: str, dtype: torch.dtype, first: bool, size: tuple[int, int]) -> Any:
    """Weights in eight bits, cast at each call; enabled before it is parallel or afterwards."""
    case = CASES[name]
    vae: Any = case.build().to(dtype)
    z, options = case.latent(*size, 0).to(dtype), (torch.float8_e4m3fn, dtype)
    twin: Any = case.build().to(dtype)
    twin.enable_layerwise_casting(*options)
    alone = decoded(twin, z)
    if first:
        vae.enable_layerwise_casting(*options)
    try:
        handle = parallelize_vae(vae, EXACT, group=everyone())
    except ParallelConfigError as refused:
        return str(refused)
    if not first:
        vae.enable_layerwise_casting(*options)
    off = [error(decoded(vae, z), alone), error(decoded(vae, z), alone)]
    handle.remove()
    off.append(error(decoded(vae, z), alone))
    stored = {parameter.dtype for parameter in vae.decoder.parameters()}
    return max(off), torch.float8_e4m3fn in stored


@pytest.mark.parametrize(
    ("name", "dtype", "first"),
    [
        ("kl", torch.float32, True),
        ("kl", torch.bfloat16, True),
        ("kl", torch.float32, False),
        ("wan-2.1", torch.float32, True),
        ("cogvideox", torch.float32, False),
    ],
)
def test_weights_that_are_cast_at_each_call_work(ranks, name, dtype, first):
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    # Of two rows, the last of three ranks has none and computes nothing.
    for off, stored in ranks.run(cast, name, dtype, first, (2, 2), world_size=3, timeout=60):
        assert off <= tolerance
        assert stored


def test_where_casting_must_come_second_it_is_said(ranks):
    for text in ranks.run(cast, "cogvideox", torch.float32, True, (2, 2)):
        assert "a CogVideoXSafeConv3d, has a forward of its own" in text
        assert "enable_layerwise_casting" in text
