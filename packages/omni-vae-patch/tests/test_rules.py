"""Rules of a user: what they make work, how far they reach, and how they are taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_vaes import LessItsMean, SmallVae, error, everyone, random, state_of, text_of
from torch import Tensor, nn

from omni_group_coordinator import ParallelConfigError
from omni_vae_patch import VaeParallelConfig, nothing_to_do, parallelize_vae, register_rule
from omni_vae_patch.spatial import rules

EXACT = VaeParallelConfig("exact")
LATENT = random(1, 4, 7, 5)


class InstanceNormRule:
    """What a user may write for a class of torch that is not known."""

    def __call__(self, name: str, module: Any, region: Any) -> Any:
        original = module.forward

        def forward(x: Tensor) -> Tensor:
            shard = region.shard
            if shard is None:
                return original(x)
            counts = shard.lengths(x.shape[shard.dim], name)
            whole = shard.gather(x, x.ndim + shard.dim, counts)
            begin = sum(counts[: shard.rank])
            return original(whole).narrow(shard.dim, begin, x.shape[shard.dim])

        module.__dict__["forward"] = forward
        return lambda: module.__dict__.pop("forward")


class Softer(nn.Softmax):
    """A class of its own, as models have them."""


def with_rules() -> list[float]:
    group, found = everyone(), []
    pieces: list[tuple[nn.Module, Any]] = [
        (nn.InstanceNorm2d(8), InstanceNormRule()),
        (nn.Softmax(1), nothing_to_do),
        (LessItsMean(), InstanceNormRule()),
        (Softer(-3), nothing_to_do),
    ]
    for module, rule in pieces:
        with register_rule(type(module), rule):
            vae = SmallVae(module)
            before, alone = state_of(vae), vae.decode(LATENT)
            with parallelize_vae(vae, EXACT, group=group):
                found.append(error(vae.decode(LATENT), alone))
            assert state_of(vae) == before
    return found


def test_a_rule_makes_an_unknown_module_work(ranks):
    for found in ranks.run(with_rules, world_size=3):
        assert max(found) <= 1e-5


class Below(LessItsMean):
    """Has the rule of its parent."""


class Holding(nn.Module):
    """Does itself what the module within it does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(8)
        self.mix = nn.Conv2d(8, 8, 3, padding=1)
        nn.init.normal_(self.mix.weight, generator=torch.Generator().manual_seed(2))
        nn.init.zeros_(self.mix.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.mix(x))


class HoldingRule:
    """For the norm; the convolution has the rule of its kind."""

    def __call__(self, name: str, module: Any, region: Any) -> Any:
        return InstanceNormRule()(f"{name}.norm", module.norm, region)


def covered() -> tuple[float, float, list[str]]:
    """A subclass, modules within one that has a rule, and what a rule taken back leaves."""
    group = everyone()
    found = []
    for module, cls, rule in (
        (Below(), LessItsMean, InstanceNormRule()),
        (Holding(), Holding, HoldingRule()),
    ):
        vae = SmallVae(module)
        alone = vae.decode(LATENT)
        with register_rule(cls, rule), parallelize_vae(vae, EXACT, group=group):
            found.append(error(vae.decode(LATENT), alone))
    after = [
        text_of(lambda m=m: parallelize_vae(SmallVae(m), EXACT, group=group))
        for m in (Below(), Holding())
    ]
    return found[0], found[1], after


def test_a_rule_covers_subclasses_and_what_is_within_until_it_is_taken_back(ranks):
    for below, holding, after in ranks.run(covered, world_size=3):
        assert max(below, holding) <= 1e-5
        assert "a Below, is the first that differs" in after[0]
        assert "is a InstanceNorm2d" in after[1]


def test_of_two_rules_of_a_class_the_first_is_back_when_the_second_is_taken_back():
    first, second = InstanceNormRule(), InstanceNormRule()
    module = LessItsMean()
    with register_rule(LessItsMean, first):
        handle = register_rule(LessItsMean, second)
        assert rules.rule_for("a", module) is second
        handle.remove()
        handle.remove()
        assert rules.rule_for("a", module) is first
    assert rules.rule_for("a", module) is None


def test_what_is_no_rule_is_refused_when_it_is_registered():
    with pytest.raises(ParallelConfigError, match="a class of modules, not for 'Mean'"):
        register_rule("Mean", nothing_to_do)  # type: ignore[arg-type]
    with pytest.raises(ParallelConfigError, match="the rule for LessItsMean is None"):
        register_rule(LessItsMean, None)  # type: ignore[arg-type]


def forgetful(name: str, module: Any, region: Any) -> Any:
    """Undoes nothing."""


def with_a_forgetful_rule() -> tuple[str, bool]:
    vae = SmallVae(LessItsMean())
    before = state_of(vae)
    with register_rule(LessItsMean, forgetful):
        text = text_of(lambda: parallelize_vae(vae, EXACT, group=everyone()))
    return text, state_of(vae) == before


def test_a_rule_that_returns_nothing_is_named_and_the_rest_undone(ranks):
    for text, same in ranks.run(with_a_forgetful_rule):
        assert "the rule forgetful for module 'decoder.3', a LessItsMean, returned None" in text
        assert same


class Between(nn.Module):
    """Mixes between the modules within it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.SiLU()
        self.second = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x - x.mean((-2, -1), keepdim=True))


class MixingVae(SmallVae):
    """Mixes in its own decode."""

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z - z.mean((-2, -1), keepdim=True))


def named() -> list[str]:
    group = everyone()
    return [
        text_of(lambda vae=vae: parallelize_vae(vae, EXACT, group=group))
        for vae in (SmallVae(Between()), MixingVae())
    ]


@pytest.mark.parametrize("world_size", [2, 3])
def test_code_between_modules_is_blamed_on_the_module_that_has_it(ranks, world_size):
    for between, own in ranks.run(named, world_size=world_size):
        assert "the code of module 'decoder.3', a Between, between the modules within" in between
        # What the first module within the decoder is given differs, and so does the decoder's.
        assert "'decoder'" in own or "the code of MixingVae itself" in own
