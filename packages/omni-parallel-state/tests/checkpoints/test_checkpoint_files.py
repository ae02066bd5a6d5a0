"""Checkpoints in one file or several, whole, damaged, or of another model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state.checkpoints.files import (
    by_file,
    checkpoint_entries,
    open_file,
    read_rows,
)
from omni_parallel_state.checkpoints.filling import fill
from omni_parallel_state.checkpoints.matching import matched
from omni_parallel_state.checkpoints.skeleton import build_skeleton

torch_files = pytest.importorskip("safetensors.torch")


class Small(nn.Module):
    """Weights that are tied, of several kinds, and buffers that are in files or not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 4)
        self.head.weight = self.stem.weight
        self.stem.requires_grad_(False)
        self.register_buffer("table", torch.tensor([0.5, -2.0, 3.25]), persistent=False)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint of it has."""
        return {k: v for k, v in self.state_dict().items() if k != "head.weight"}


@pytest.fixture(params=[1, 2], ids=["one file", "an index"])
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Of `Small`."""
    state = Small().tensors()
    if request.param == 1:
        torch_files.save_file(state, tmp_path / "model.safetensors")
        return tmp_path
    listed = {}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        part = {k: v for k, v in state.items() if ("blocks" in k) is (number == 2)}
        torch_files.save_file(part, tmp_path / name)
        listed |= dict.fromkeys(part, name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    return tmp_path


def load(folder: Path, dtype: torch.dtype | None = None) -> Small:
    model = build_skeleton(Small, folder, dtype)
    assert isinstance(model, Small)
    entries = matched(model, checkpoint_entries(folder, None), "apply")
    fill(model, model.state_dict(keep_vars=True), entries, torch.device("cpu"))
    return model


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_skeleton_that_is_filled_is_the_model(
    checkpoint: Path, dtype: torch.dtype | None
) -> None:
    skeleton = build_skeleton(Small, checkpoint, dtype)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert not any(buffer.is_meta for buffer in skeleton.buffers())
    found, expected = load(checkpoint, dtype), Small().eval()
    assert found.head.weight is found.stem.weight
    assert not found.training
    assert torch.equal(found.table, expected.table.to(found.table.dtype))
    for (key, one), other in zip(
        found.state_dict(keep_vars=True).items(),
        expected.state_dict(keep_vars=True).values(),
        strict=True,
    ):
        wanted = dtype if dtype and other.is_floating_point() else other.dtype
        assert one.dtype is wanted, key
        assert torch.equal(one, other.to(wanted)), key
        assert one.requires_grad == other.requires_grad, key


def test_a_part_is_filled_alone_and_ties_reach_what_is_elsewhere(checkpoint: Path) -> None:
    model = build_skeleton(Small, checkpoint, None)
    tensors = model.state_dict(keep_vars=True)
    entries = matched(model, checkpoint_entries(checkpoint, None), "apply")
    away = nn.ModuleList([model.blocks[2], model.head])  # type: ignore[index]
    del model.blocks[2], model.head  # type: ignore[operator,union-attr]
    fill(model, tensors, entries, torch.device("cpu"), [away])
    expected = Small().state_dict()
    assert torch.equal(model.blocks[1].weight, expected["blocks.1.weight"])  # type: ignore[index]
    assert away[0].weight.is_meta
    assert away[1].bias.is_meta
    assert away[1].weight is model.stem.weight
    assert not model.stem.weight.is_meta


def test_rows_of_a_tensor_are_read_alone(checkpoint: Path) -> None:
    entries = checkpoint_entries(checkpoint, None)
    expected = Small().state_dict()["blocks.1.weight"]
    for file, keys in by_file({"blocks.1.weight": entries["blocks.1.weight"]}):
        with open_file(file) as opened:
            (key,) = keys
            assert torch.equal(read_rows(opened, entries[key], slice(1, 3)), expected[1:3])
            assert read_rows(opened, entries[key], slice(3, 3)).shape == (0, 4)


def error_of(folder: Path, variant: str | None = None) -> str:
    with pytest.raises(ParallelConfigError) as caught:
        checkpoint_entries(folder, variant)
    return str(caught.value)


def test_files_that_are_missing_damaged_or_lack_a_tensor(checkpoint: Path) -> None:
    last = sorted(checkpoint.glob("*.safetensors"))[-1]
    assert "fp16" in error_of(checkpoint, "fp16")
    assert "there is: nothing" in error_of(checkpoint / "absent")
    if (index := checkpoint / "model.safetensors.index.json").exists():
        state = torch_files.load_file(last)
        torch_files.save_file({k: v for k, v in state.items() if "0.bias" not in k}, last)
        assert "lack 1 tensors of its index: blocks.0.bias" in error_of(checkpoint)
        last.write_bytes(b"")
        assert last.name in error_of(checkpoint)
        last.unlink()
        assert f"lacks 1 of the files that its index names: {last.name}" in error_of(checkpoint)
        index.write_text("[]")
        assert "no index" in error_of(checkpoint)
    else:
        last.write_bytes(last.read_bytes()[:-4])
        assert f"{last} cannot be read" in error_of(checkpoint)


def test_all_keys_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = Small().tensors()
    del state["blocks.2.weight"], state["stem.weight"]
    state |= {"extra": torch.ones(1), "head.bias": torch.ones(3)}
    state["norm.num_batches_tracked"] = torch.tensor(1.5)
    torch_files.save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ParallelConfigError) as caught:
        matched(Small(), checkpoint_entries(tmp_path, None), "apply")
    text = str(caught.value)
    assert "missing (3): stem.weight, blocks.2.weight, head.weight" in text
    assert "unexpected (1): extra" in text
    assert "shapes (1): head.bias is [3] in the checkpoint, [4] in the model" in text
    assert "norm.num_batches_tracked is torch.float32 in the checkpoint, torch.int64" in text


def test_without_the_package_that_reads_the_files(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install safetensors" in error_of(checkpoint)


def test_what_makes_no_module_or_has_no_such_dtype(tmp_path: Path) -> None:
    with pytest.raises(ParallelConfigError, match="makes a dict"):
        build_skeleton(dict, tmp_path, None)  # type: ignore[arg-type]
    with pytest.raises(ParallelConfigError, match=r"torch\.int8"):
        build_skeleton(Small, tmp_path, torch.int8)
