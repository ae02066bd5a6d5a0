"""A stage's part that is read from files is the part of the whole model, and no more is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from partition_case import randomised
from partition_models import CASES
from torch import Tensor, nn

from omni_parallel_state import ParallelLayout, ParallelState
from omni_pp import PipelineParallelConfig, apply_pipeline_parallel, load_stage, partition_model
from omni_pp.partition import partition_of
from rank_harness import RankPool

pytest.importorskip("diffusers")
pytest.importorskip("safetensors")

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:In CPU autocast:UserWarning"
)


def saved(name: str, folder: Path, dtype: torch.dtype | None = None, **options: Any) -> type:
    model = randomised(CASES[name].build)
    model.to(dtype).save_pretrained(folder, **options)
    return type(model)


def held(model: nn.Module) -> dict[str, Tensor]:
    """All tensors: parameters, buffers, also those in no file, and plain attributes."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for kept in (module._parameters, module._buffers, vars(module)):
            for key, value in kept.items():
                if isinstance(value, Tensor):
                    found[f"{prefix}.{key}"] = value
    return found


def differing(one: nn.Module, other: nn.Module) -> list[str]:
    """Names of tensors that are not the same, bit for bit, or of another kind."""
    first, second = held(one), held(other)
    return sorted(first.keys() ^ second.keys()) + [
        key
        for key, tensor in first.items()
        if not torch.equal(tensor, second[key])
        or tensor.dtype is not second[key].dtype
        or type(tensor) is not type(second[key])
        or tensor.requires_grad != second[key].requires_grad
    ]


def outputs(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [one for part in output for one in outputs(part)]


@torch.no_grad()
def load_and_compare(
    cls: Any, folder: Path, name: str, options: dict[str, Any], cut: dict[str, Any]
) -> dict[str, Any]:
    """Against loading in the ordinary way, and cutting that."""
    world, rank = dist.get_world_size(), dist.get_rank()
    state = ParallelState(ParallelLayout(pp=world))
    whole = cls.from_pretrained(folder, **options).eval()
    for parameter in whole.parameters():  # they lie in the file: kernels round otherwise there
        parameter.data = parameter.data.clone()
    dtype = options.get("dtype") or torch.float32
    call = {
        key: value.to(dtype) if getattr(value, "dtype", None) is torch.float32 else value
        for key, value in CASES[name].call().items()
    }
    expected = outputs(whole(**call, return_dict=False))
    loaded = load_stage(cls, folder, PipelineParallelConfig(**cut), state=state, **options)
    part = partition_of(loaded)
    names = {"virtual_stages": 1, **cut}
    reference = partition_model(whole, world, stage=rank, **names)
    whole_calls = PipelineParallelConfig(micro_batches=1)  # kernels round by the size of a batch
    with apply_pipeline_parallel(loaded, whole_calls, state=state):
        found = outputs(loaded(**call, return_dict=False))
    assert part is not None
    return {
        "differing": differing(loaded, whole),
        "boundaries": part.boundaries == reference.boundaries,
        "bytes": part.parameter_bytes == reference.parameter_bytes == part.promised_bytes(rank),
        "away": [name for name, _ in part.released()] == [n for n, _ in reference.released()],
        "evaluation": not any(module.training for module in loaded.modules()),
        "equal": all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)),
        "says something": all(one.float().std() > 1e-3 for one in expected),
        "still cut": partition_of(loaded) is part,
    }


def check(
    ranks: RankPool,
    folder: Path,
    name: str,
    cls: type,
    world: int = 2,
    cut: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    for found in ranks.run(
        load_and_compare, cls, folder, name, options, cut or {}, world_size=world
    ):
        assert found.pop("differing") == []
        assert found == dict.fromkeys(found, True)


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_part_of_the_whole_model(ranks: RankPool, tmp_path: Path, name: str) -> None:
    check(ranks, tmp_path, name, saved(name, tmp_path))


@pytest.mark.parametrize(
    ("world", "cut"),
    [
        (3, {}),
        (2, {"virtual_stages": 2}),
        (2, {"points": (3,)}),
        (2, {"balance": "count"}),
        (2, {"balance": (1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0)}),
    ],
)
def test_an_index_of_several_files_cut_in_every_way(
    ranks: RankPool, tmp_path: Path, world: int, cut: dict[str, Any]
) -> None:
    cls = saved("Flux", tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 2
    check(ranks, tmp_path, "Flux", cls, world, cut)


@pytest.mark.parametrize("name", ["Wan", "SD3"])
def test_weights_get_the_dtype_but_for_what_the_class_keeps_in_float32(
    ranks: RankPool, tmp_path: Path, name: str
) -> None:
    check(ranks, tmp_path, name, saved(name, tmp_path), dtype=torch.bfloat16)


def test_an_indexed_variant_in_a_subfolder(ranks: RankPool, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    cls = saved("SD3", inner, torch.bfloat16, variant="bf16", max_shard_size="50KB")
    assert list(inner.glob("*.index.bf16.json"))
    options = {"dtype": torch.bfloat16, "variant": "bf16", "subfolder": "inner"}
    check(ranks, tmp_path, "SD3", cls, **options)


def read_here(cls: Any, folder: Path) -> tuple[int, set[str]]:
    """Bytes that this stage reads, and the names of its tensors."""
    from omni_parallel_state.checkpoints import filling

    read: dict[str, int] = {}
    below = filling.read_rows

    def counted(opened: Any, entry: Any, *args: Any) -> Tensor:
        tensor = below(opened, entry, *args)
        read[entry.key] = tensor.nbytes
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "read_rows", counted)
        loaded = load_stage(cls, folder, state=ParallelState(ParallelLayout(pp=2)))
    part = partition_of(loaded)
    assert part is not None
    assert sum(read.values()) == part.parameter_bytes + sum(b.nbytes for b in loaded.buffers())
    return sum(read.values()), set(read)


def test_only_the_tensors_of_the_part_are_read(ranks: RankPool, tmp_path: Path) -> None:
    cls = saved("Flux", tmp_path, max_shard_size="50KB")
    whole = sum(one.nbytes for one in CASES["Flux"].build().state_dict().values())
    (first, one), (second, other) = ranks.run(read_here, cls, tmp_path)
    assert max(first, second) < 0.7 * whole
    blocks = re.compile(r"(single_)?transformer_blocks\.\d+\.")
    assert {key for key in one & other if blocks.match(key)} == set()
    assert len(one | other) == len(CASES["Flux"].build().state_dict())


def test_one_rank_loads_all_and_needs_no_groups(tmp_path: Path) -> None:
    cls: Any = saved("Flux", tmp_path)
    loaded = load_stage(cls, tmp_path, state=ParallelState(ParallelLayout()))
    assert partition_of(loaded) is None
    assert differing(loaded, cls.from_pretrained(tmp_path).eval()) == []
