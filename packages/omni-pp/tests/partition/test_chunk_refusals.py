"""Arguments and hooks that depend on the position of a block among all are refused."""

from __future__ import annotations

from typing import Any

import partition_toys as toys
import pytest
import torch
from partition_flow import all_stages, run_chunks
from partition_images import flux, flux_call, sd3, sd3_call
from partition_models import CASES

from omni_group_coordinator import ParallelConfigError
from omni_pp.partition import partition_model


def given(name: str, value: Any) -> None:
    """Calls a chunk with one more argument."""
    model = sd3() if name in ("skip_layers", "block_controlnet_hidden_states") else flux()
    call = sd3_call() if model.__class__.__name__.startswith("SD3") else flux_call()
    parts = all_stages(model.eval(), 2)
    run_chunks(parts, **call, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("controlnet_block_samples", [torch.ones(2, 15, 48)]),
        ("controlnet_single_block_samples", (torch.ones(2, 15, 48),)),
        ("controlnet_blocks_repeat", True),
        ("skip_layers", [1]),
        ("block_controlnet_hidden_states", torch.ones(1, 2, 15, 24)),
    ],
)
def test_arguments_that_count_blocks(name: str, value: Any) -> None:
    with pytest.raises(ParallelConfigError, match=f"cannot take '{name}': .*Legal: None"):
        given(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("controlnet_block_samples", None),
        ("controlnet_blocks_repeat", False),
        ("skip_layers", []),
    ],
)
def test_arguments_that_count_no_blocks(name: str, value: Any) -> None:
    given(name, value)


def test_such_an_argument_by_position() -> None:
    part = partition_model(toys.Toy(), 2, stage=0)
    args = [toys.toy_input(), 1.0, [torch.ones(3, 8)]]
    part.model.embed.register_forward_hook(lambda *_: pytest.fail("ran"))
    with pytest.raises(ParallelConfigError, match=r"Toy .* 'controlnet_block_samples'"):
        part.chunks[0].run(part.model, args, {}, None, lambda tree: None)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("Flux2", "kv_cache_mode"),
        ("LTX2", "perturbation_mask"),
        ("LTX2", "spatio_temporal_guidance_blocks"),
        ("QwenImage", "controlnet_block_samples"),
        ("Sana", "controlnet_block_samples"),
        ("ZImage", "controlnet_block_samples"),
    ],
)
def test_such_arguments_of_other_models(name: str, argument: str) -> None:
    case = CASES[name]
    part = partition_model(case.build(), 2, stage=0)
    with pytest.raises(ParallelConfigError, match=argument):
        part.chunks[0].run(
            part.model, (), case.call() | {argument: torch.ones(1)}, None, lambda tree: None
        )


def test_a_cache_by_which_one_block_decides_for_all() -> None:
    from diffusers import FirstBlockCacheConfig

    model = flux()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    part = partition_model(model, 2, stage=1)
    with pytest.raises(ParallelConfigError, match=r"FBC.*Hook.*disable_cache"):
        part.chunks[0].run(part.model, (), flux_call(), lambda: None, None)
    part.model.disable_cache()
    shapes = (torch.ones(2, 7, 48), torch.ones(2, 15, 48))
    with torch.no_grad():
        part.chunks[0].run(part.model, (), flux_call(), lambda: shapes, None)


def test_what_goes_by_position_on_a_part_of_a_list() -> None:
    part = partition_model(flux(), 2, stage=1)
    blocks = part.model.single_transformer_blocks
    for take in (iter, lambda held: held[0], lambda held: held[:1]):
        with pytest.raises(ParallelConfigError, match=r"by position, of which this stage holds"):
            take(blocks)
    held = [block for name, block in part.blocks_of(1) if name.startswith("single")]
    assert list(blocks.children()) == held
    assert "FluxSingleTransformerBlock" in repr(blocks)
    part.restore()
    assert type(blocks) is torch.nn.ModuleList
    assert len(list(blocks)) == len(blocks)
