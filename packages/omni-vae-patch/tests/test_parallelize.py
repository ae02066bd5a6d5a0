"""`parallelize_vae` refuses what it cannot do before anything runs, and undoes what it does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_vaes import SmallVae, error, everyone, random, text_of
from torch import Tensor, nn

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state import ParallelLayout, ParallelState
from omni_vae_patch import VaeParallelConfig, nothing_to_do, parallelize_vae, register_rule
from omni_vae_patch.spatial import rules

EXACT = VaeParallelConfig("exact")
UNVERIFIED = VaeParallelConfig("exact", verify=False)
LATENT = random(1, 4, 7, 5)


def state_of(vae: nn.Module) -> dict[str, Any]:
    """What of an autoencoder must be as it was."""
    return {name: (type(one), set(vars(one))) for name, one in vae.named_modules()}


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "mode='fast'; legal: 'auto', 'exact', 'tile'"),
        ({"dim": "depth"}, "dim='depth'; legal: 'auto', 'height', 'width'"),
        ({"dim": -1}, "dim=-1; legal: 'auto', 'height', 'width'"),
        ({"result": "last"}, "result='last'; legal: 'all', 'first'"),
    ],
)
def test_a_configuration_that_is_none_is_refused(options, message):
    with pytest.raises(ParallelConfigError, match=message):
        VaeParallelConfig(**options)


def refused() -> list[str]:
    group = everyone()
    vae = SmallVae()
    nameless = SmallVae()
    nameless.config = SimpleNamespace()
    first = parallelize_vae(vae, UNVERIFIED, group=group)
    texts = [
        text_of(lambda: parallelize_vae(object(), group=group)),
        text_of(lambda: parallelize_vae(SimpleNamespace(vae=None), group=group)),
        text_of(lambda: parallelize_vae(vae, group=group)),
        text_of(lambda: parallelize_vae(SimpleNamespace(vae=vae), group=group)),
        text_of(lambda: parallelize_vae(nameless, EXACT, group=group)),
        text_of(
            lambda: parallelize_vae(
                SmallVae(), VaeParallelConfig("exact", shared_norms=True), group=group
            )
        ),
        text_of(lambda: parallelize_vae(SmallVae())),
        text_of(lambda: vae.decode(LATENT[0])),
        text_of(lambda: vae.decode(LATENT[:, :3])),
        text_of(lambda: vae.decode(LATENT[:, :, None])),
    ]
    found = vae.decode(LATENT)
    first.remove()
    return [*texts, error(found, vae.decode(LATENT))]


def test_bad_input_is_said_on_every_rank_and_the_next_call_is_right(ranks):
    for *texts, off in ranks.run(refused):
        shape = "this autoencoder decodes (batch, channels, height, width) with 4 channels"
        for text, part in zip(
            texts,
            [
                "ParallelConfigError: object is neither an autoencoder nor a pipeline",
                "ParallelConfigError: NoneType is neither an autoencoder nor a pipeline",
                "ParallelConfigError: this SmallVae is parallel already; call remove()",
                "ParallelConfigError: this SmallVae is parallel already; call remove()",
                "ParallelConfigError: SmallVae has neither latent_channels nor z_dim in its config",
                "ParallelConfigError: shared_norms is for tiles",
                "ParallelError: there is no parallel state",
                f"ParallelConfigError: a latent of shape (4, 7, 5); {shape}",
                f"ParallelConfigError: a latent of shape (1, 3, 7, 5); {shape}",
                f"ParallelConfigError: a latent of shape (1, 4, 1, 7, 5); {shape}",
            ],
            strict=True,
        ):
            assert part in text
        assert off <= 1e-5


class LessItsMean(nn.Module):
    """Mixes all positions, in its own forward and by no module."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((-2, -1), keepdim=True)


class LessItsMeanAcross(nn.Module):
    """Right as long as height is sharded."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(-2, keepdim=True)


class FixedRows(nn.Module):
    """Takes only the rows that the whole has."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.flip(-2)


UNKNOWN: dict[str, nn.Module] = {
    "InstanceNorm2d": nn.InstanceNorm2d(8),
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d(4),
    "Upsample": nn.Upsample(scale_factor=2, mode="bilinear"),
    "MultiheadAttention": nn.MultiheadAttention(8, 2),
    "ConvTranspose2d": nn.ConvTranspose2d(8, 8, 2, 2),
}
CIRCULAR = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
MIXING = [LessItsMean(), LessItsMeanAcross(), FixedRows()]


def found_out(module: nn.Module, config: VaeParallelConfig) -> tuple[str, int, bool]:
    """What is said, how many modules ran before, and whether all is as it was."""
    vae, ran = SmallVae(nn.Sequential(module)), []
    hooks = [m.register_forward_hook(lambda *_: ran.append(1)) for m in vae.modules()]
    before = state_of(vae)
    text = text_of(lambda: parallelize_vae(vae, config, group=everyone()))
    same = state_of(vae) == before and "decode" not in vars(vae)
    for hook in hooks:
        hook.remove()
    return text, len(ran), same


def found_out_each(modules: list[nn.Module], config: VaeParallelConfig) -> list[Any]:
    return [found_out(module, config) for module in modules]


def test_a_module_of_an_unknown_kind_is_named_before_anything_runs(ranks):
    modules = [*UNKNOWN.values(), CIRCULAR]
    for results in ranks.run(found_out_each, modules, EXACT):
        for name, (text, ran, same) in zip(UNKNOWN, results, strict=False):
            assert f"ParallelConfigError: module 'decoder.3.0' is a {name}" in text
            assert "register_rule" in text
            assert ran == 0
            assert same
        text, _, same = results[-1]
        assert "module 'decoder.3.0', a Conv2d, pads around the whole" in text
        assert same


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_module_that_mixes_space_in_its_forward_is_found_and_named(ranks, world_size):
    for results in ranks.run(found_out_each, MIXING, EXACT, world_size=world_size):
        for module, (text, _, same) in zip(MIXING, results, strict=True):
            name = type(module).__name__
            assert "ParallelConfigError: SmallVae decodes otherwise when its height is" in text
            assert f"module 'decoder.3.0', a {name}, is the first that differs" in text
            assert same


def test_only_the_side_that_is_sharded_must_work(ranks):
    across = [LessItsMeanAcross()]
    for (text, _, _), *_ in ranks.run(found_out_each, across, VaeParallelConfig("exact", "width")):
        assert text == "none"


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


def with_rules() -> list[float]:
    group, found = everyone(), []
    pieces: list[tuple[nn.Module, Any]] = [
        (nn.InstanceNorm2d(8), InstanceNormRule()),
        (nn.Softmax(1), nothing_to_do),
        (LessItsMean(), InstanceNormRule()),
    ]
    for module, rule in pieces:
        register_rule(type(module), rule)
        try:
            vae = SmallVae(module)
            before, alone = state_of(vae), vae.decode(LATENT)
            with parallelize_vae(vae, EXACT, group=group):
                found.append(error(vae.decode(LATENT), alone))
            assert state_of(vae) == before
        finally:
            del rules._registered[type(module)]
    return found


def test_a_rule_makes_an_unknown_module_work(ranks):
    for found in ranks.run(with_rules, world_size=3):
        assert max(found) <= 1e-5


# -- applying and removing ---------------------------------------------------------------------


def applied_and_removed() -> bool:
    group, vae = everyone(), SmallVae()
    before = state_of(vae)
    pipeline = SimpleNamespace(vae=vae)
    handle = parallelize_vae(pipeline, UNVERIFIED, group=group)
    parallel = "decode" in vars(vae)
    handle.remove()
    handle.remove()
    once = state_of(vae) == before
    with pytest.raises(ZeroDivisionError), parallelize_vae(vae, UNVERIFIED, group=group):
        raise ZeroDivisionError
    twice = state_of(vae) == before
    vae.decode = own = vae.decoder.forward  # what an instance had of its own
    parallelize_vae(vae, UNVERIFIED, group=group).remove()
    return parallel and once and twice and vars(vae)["decode"] is own


def test_a_handle_gives_back_what_was_there_once(ranks):
    assert all(ranks.run(applied_and_removed))


def test_one_rank_alone_changes_nothing_but_keeps_the_rules_of_use():
    state = ParallelState(ParallelLayout())
    vae = SmallVae(nn.InstanceNorm2d(8))
    before, alone = state_of(vae), vae.decode(LATENT)
    with parallelize_vae(vae, EXACT, state=state) as handle:
        assert torch.equal(vae.decode(LATENT), alone)
        with pytest.raises(ParallelConfigError, match="parallel already"):
            parallelize_vae(vae, state=state)
    handle.remove()
    assert state_of(vae) == before
    parallelize_vae(vae, state=state).remove()
    state.destroy()
