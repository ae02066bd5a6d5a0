"""`parallelize_vae` refuses what it cannot do before anything runs, and undoes what it does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_vaes import LessItsMean, SmallVae, error, everyone, random, state_of, text_of
from torch import Tensor, nn

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state import ParallelLayout, ParallelState
from omni_vae_patch import VaeParallelConfig, parallelize_vae

EXACT = VaeParallelConfig("exact")
UNVERIFIED = VaeParallelConfig("exact", verify=False)
LATENT = random(1, 4, 7, 5)


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "mode='fast'; legal: 'auto', 'exact', 'tile'"),
        ({"dim": "depth"}, "dim='depth'; legal: 'auto', 'height', 'width'"),
        ({"dim": -1}, "dim=-1; legal: 'auto', 'height', 'width'"),
        ({"result": "last"}, "result='last'; legal: 'all', 'first'"),
        ({"mode": "tile", "dim": "width"}, "dim='width' with mode='tile': .* legal: dim='auto'"),
    ],
)
def test_a_configuration_that_is_none_is_refused(options, message):
    with pytest.raises(ParallelConfigError, match=message):
        VaeParallelConfig(**options)


WRONG_SAMPLES = [random(3, 14, 10), random(1, 4, 14, 10), random(1, 3, 1, 14, 10)]


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
        *(text_of(lambda x=x: vae.encode(x)) for x in WRONG_SAMPLES),
    ]
    found = vae.decode(LATENT)
    first.remove()
    return [*texts, error(found, vae.decode(LATENT))]


def test_bad_input_is_said_on_every_rank_and_the_next_call_is_right(ranks):
    for *texts, off in ranks.run(refused):
        shape = "this autoencoder decodes (batch, channels, height, width) with 4 channels"
        sample = "this autoencoder encodes (batch, channels, height, width) with 3 channels"
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
                *(
                    f"ParallelConfigError: a sample of shape {tuple(x.shape)}; {sample}"
                    for x in WRONG_SAMPLES
                ),
            ],
            strict=True,
        ):
            assert part in text
        assert off <= 1e-5


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
    "MultiheadAttention": nn.MultiheadAttention(8, 2),
    "Unfold": nn.Unfold(3),
    "Flatten": nn.Flatten(),
    "Softmax": nn.Softmax(-1),
    "LayerNorm": nn.LayerNorm((8, 4, 4)),
    "GLU": nn.GLU(),
}
REFUSED: dict[str, tuple[nn.Module, str]] = {
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d(4), "pools to [4, 4], of which a rank has no part"),
    "MaxPool2d": (nn.MaxPool2d(2, return_indices=True), "returns positions"),
    "LPPool2d": (nn.LPPool2d(2, 3, 1), "has windows that overlap"),
    "ZeroPad2d": (nn.ZeroPad2d((0, 0, -1, 0)), "pads by (0, 0, -1, 0)"),
    "Upsample": (
        nn.Upsample(scale_factor=2, mode="bicubic", align_corners=True),
        "interpolates by 'bicubic' with align_corners=True",
    ),
}
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
    for results in ranks.run(found_out_each, list(UNKNOWN.values()), EXACT):
        for name, (text, ran, same) in zip(UNKNOWN, results, strict=True):
            assert f"ParallelConfigError: module 'decoder.3.0' is a {name}" in text
            assert "register_rule" in text
            assert ran == 0
            assert same


def test_a_module_that_cannot_be_exact_is_named_with_the_reason(ranks):
    modules = [module for module, _ in REFUSED.values()]
    for results in ranks.run(found_out_each, modules, EXACT):
        for (name, (_, why)), (text, _, same) in zip(REFUSED.items(), results, strict=True):
            assert f"ParallelConfigError: module 'decoder.3.0', a {name}, {why}" in text
            assert "register_rule" in text
            assert same


OUT_OF_STEP: dict[str, tuple[nn.Module, str]] = {
    "AvgPool2d": (nn.AvgPool2d(3, 1), "padding of 2 to 2 rows in all instead of 0"),
    "MaxPool2d": (nn.MaxPool2d(3), "makes one row of 3"),
    "ConvTranspose2d": (nn.ConvTranspose2d(8, 8, 4, 2), "a kernel of 2 rows"),
    "Upsample": (nn.Upsample(scale_factor=1.3), "resizes by 1.3"),
    "Conv2d": (nn.Conv2d(8, 8, 5, padding=1), "has 2 rows of padding"),
    "valid": (nn.Conv2d(8, 8, 3), ""),
    "padded, valid": (nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(8, 8, 3)), "has 1 rows"),
    "padded, not convolved": (
        nn.Sequential(nn.ReflectionPad2d(1), nn.AvgPool2d(3, 1)),
        "'decoder.3.0.0', a ReflectionPad2d, pads a shard, and module 'decoder.3.0.1'",
    ),
    "padded twice": (
        nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(8, 8, 5, padding=1)),
        "legal: padding by one of them",
    ),
}


@pytest.mark.parametrize("world_size", [2, 3])
def test_rows_out_of_step_are_an_error_on_all_ranks(ranks, world_size):
    modules = [module for module, _ in OUT_OF_STEP.values()]
    for results in ranks.run(found_out_each, modules, EXACT, world_size=world_size):
        for (name, (_, why)), (text, _, same) in zip(OUT_OF_STEP.items(), results, strict=True):
            assert text.startswith("ParallelConfigError"), name
            assert why in text, name
            assert "register_rule" in text or name == "valid"
            assert same


def on_odd_rows(modules: list[nn.Module]) -> list[str]:
    """What a call says, without a check beforehand; and whether the group goes on."""
    group, found = everyone(), []
    for module in modules:
        vae = SmallVae(nn.Sequential(module))
        with parallelize_vae(vae, UNVERIFIED, group=group):
            found.append(text_of(lambda vae=vae: vae.decode(LATENT)))
    found.append(text_of(group.barrier))
    return found


def test_a_call_that_cannot_be_exact_is_an_error_also_without_the_check(ranks):
    modules = [nn.AvgPool2d(2), nn.MaxPool2d(3, 1), nn.Upsample(scale_factor=0.5)]
    for *found, last in ranks.run(on_odd_rows, modules, world_size=3, timeout=40):
        for text in found:
            assert "module 'decoder.3.0'" in text
        assert last == "none"


def on_uneven_pads(pad: nn.Module, shape: tuple[int, ...], dim: Any) -> tuple[str, float]:
    """A pad that reaches further than the neighbour's rows, and what decodes after it."""
    torch.manual_seed(5)
    vae = SmallVae(nn.Sequential(pad, nn.Conv2d(8, 8, 3))).requires_grad_(False)
    few, more = random(*shape), random(1, 4, 9, 12)
    expected = vae.decode(more)
    state = ParallelState(ParallelLayout(dp=3, vae=3))
    with parallelize_vae(vae, VaeParallelConfig("exact", dim), state=state):
        text = text_of(lambda: vae.decode(few))
        return text, error(vae.decode(more), expected)


@pytest.mark.parametrize(
    ("pad", "shape", "dim"),
    [
        (nn.ZeroPad2d((0, 2, 1, 1)), (1, 4, 6, 5), "width"),
        (nn.ReplicationPad2d((0, 2, 1, 1)), (1, 4, 6, 5), "width"),
        (nn.ZeroPad2d((1, 1, 0, 2)), (1, 4, 5, 6), "height"),
    ],
)
def test_a_pad_that_reaches_beyond_a_neighbour_is_an_error_on_all_ranks(ranks, pad, shape, dim):
    for text, difference in ranks.run(on_uneven_pads, pad, shape, dim, world_size=3, timeout=40):
        assert "not only those at the borders would reach beyond them" in text
        assert difference <= 1e-5


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
