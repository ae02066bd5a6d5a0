"""Which lists are found, and what is refused by the source of a forward."""

from __future__ import annotations

import diffusers
import partition_refused_toys as refused
import partition_toys as toys
import pytest
import torch
from partition_flow import all_stages, run_chunks
from partition_images import flux, z_image
from torch import nn

from omni_group_coordinator import ParallelConfigError
from omni_pp.partition import BlockList, find_block_lists, partition_model


def names(model: nn.Module, *asked: str) -> tuple[str, ...]:
    return tuple(one.name for one in find_block_lists(model, asked))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (toys.Toy, ("blocks",)),
        (toys.Inherited, ("blocks",)),
        (toys.Checkpointed, ("blocks",)),
        (toys.Plain, ("blocks", "single_blocks")),
        (toys.OddName, ("strata",)),
    ],
)
@torch.no_grad()
def test_forwards_that_can_be_cut(build: type, expected: tuple[str, ...]) -> None:
    model = build()
    assert names(model) == expected
    x = toys.toy_input()
    for stages in range(1, 1 + sum(one.length for one in find_block_lists(model))):
        assert torch.equal(run_chunks(all_stages(model, stages), x), model(x))


REFUSALS = [
    (refused.Position, "uses the position of a block in the loop over blocks"),
    (refused.Attribute, "uses a block other than by calling it"),
    (refused.Counter, "hands on 'at' besides what the block returns"),
    (refused.CounterBefore, "hands on 'at' besides what the block returns"),
    (refused.Residual, "hands on 'before' besides what the block returns"),
    (refused.Collected, r"does more than to call the block \(found.append\(x\)\)"),
    (refused.Kept, "reads 'scaled' after the loop over blocks"),
    (refused.Zipped, "zips blocks with something else"),
    (refused.Twice, "loops over blocks more than once"),
    (refused.CalledTwice, "calls a block more than once in the loop over blocks"),
    (refused.Repeated, "has another loop around it"),
    (refused.Measured, "uses blocks other than in a loop over it"),
    (refused.Indexed, "uses blocks other than in a loop over it"),
    (
        refused.Stale,
        "reads 'x', which the loop over blocks gave, in or after that over single",
    ),
    (refused.StaleBySteps, "reads 'quarter', which the loop over blocks gave"),
    (refused.HalfSeen, "not plainly over single_blocks"),
    (refused.UShaped, "blocks.0 takes 'skip', so the model is U-shaped"),
    (refused.UNet, "it is a UNet"),
    (refused.Helper, r"no trunk of blocks found .* its lists: blocks \(5\)"),
    (refused.TwoOddNames, r"several lists that may be it \(layers_of_text, strata\)"),
]


@pytest.mark.parametrize(("build", "message"), REFUSALS)
def test_forwards_that_cannot_be_cut(build: type, message: str) -> None:
    with pytest.raises(ParallelConfigError, match=message) as caught:
        find_block_lists(build())
    assert build.__name__ in str(caught.value)


def test_what_was_looked_for_is_said() -> None:
    with pytest.raises(ParallelConfigError, match=r"transformer_blocks, .*layers"):
        find_block_lists(nn.Sequential(nn.Linear(2, 2)))


def test_named_lists() -> None:
    model = refused.TwoOddNames()
    assert names(model, "strata") == ("strata",)
    assert names(model, "layers_of_text", "strata") == ("layers_of_text", "strata")
    assert names(flux(), "single_transformer_blocks") == ("single_transformer_blocks",)
    assert names(refused.HalfSeen(), "blocks") == ("blocks",)


@pytest.mark.parametrize(
    ("build", "asked", "message"),
    [
        (toys.Toy, ["nothing"], r"no list of blocks 'nothing'; its lists: blocks \(5\)"),
        (toys.Toy, ["blocks", "blocks"], "names a list twice"),
        (
            refused.TwoOddNames,
            ["strata", "layers_of_text"],
            "does not loop over these in this order",
        ),
        (refused.Helper, ["blocks"], "does not loop over these in this order, but over no list"),
        (
            flux,
            ["single_transformer_blocks", "transformer_blocks"],
            "in order of execution, which are transformer_blocks, single_transformer_blocks",
        ),
        (z_image, ["noise_refiner"], "not lists of the trunk"),
    ],
)
def test_named_lists_that_do_not_fit(build, asked: list[str], message: str) -> None:
    with pytest.raises(ParallelConfigError, match=message):
        find_block_lists(build(), asked)


def test_one_list_under_two_names() -> None:
    model = toys.Plain()
    model.single_blocks = model.blocks
    with pytest.raises(ParallelConfigError, match="are one list, which is used twice"):
        find_block_lists(model)


def test_lists_without_blocks() -> None:
    assert find_block_lists(flux(0, 2)) == (BlockList("single_transformer_blocks", 2),)
    with pytest.raises(ParallelConfigError, match="are empty"):
        find_block_lists(flux(0, 0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about itself
def test_models_compiled_as_a_whole() -> None:
    for model in (torch.compile(toys.Toy()), toys.Toy()):
        model.compile()
        with pytest.raises(ParallelConfigError, match="compile its blocks instead"):
            find_block_lists(model)


def test_a_forward_without_source() -> None:
    space = {"Base": toys.Toy}
    exec("class Typed(Base):\n  def forward(self, x):\n    return Base.forward(self, x)", space)
    model = space["Typed"]()
    with pytest.raises(ParallelConfigError, match="cannot be read"):
        find_block_lists(model)
    assert find_block_lists(model, ["blocks"]) == (BlockList("blocks", 5),)


def test_a_class_of_ours_with_a_name_of_theirs() -> None:
    impostor = type("FluxTransformer2DModel", (refused.Position,), {})
    impostor.forward = refused.Position.forward
    with pytest.raises(ParallelConfigError, match="uses the position"):
        find_block_lists(impostor())


def hunyuan_dit() -> nn.Module:
    return diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=4,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=4,
        text_len=4,
        text_len_t5=4,
    )


def wan_vace() -> nn.Module:
    return diffusers.WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=4,
        vace_layers=[0, 2],
        vace_in_channels=8,
    )


def unet() -> nn.Module:
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


def chroma() -> nn.Module:
    return diffusers.ChromaTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=8,
        approximator_layers=1,
    )


@pytest.mark.filterwarnings("ignore:.FluxPosEmbed")  # of diffusers, about itself
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (hunyuan_dit, "HunyuanDiT2DModel .* U-shaped"),
        (wan_vace, "WanVACETransformer3DModel .* second stream"),
        (unet, "UNet2DModel .* is a UNet"),
        (chroma, "ChromaTransformer2DModel .* position"),
    ],
)
def test_families_that_cannot_be_cut(build, message: str) -> None:
    model = build()
    before = dict(model.named_modules())
    with pytest.raises(ParallelConfigError, match=message):
        partition_model(model, 2, stage=0)
    assert dict(model.named_modules()) == before
