"""Checkpoints that do not fit, lack something, or are damaged."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
import torch.distributed as dist
from toy_sharded import Toy, config, seeded, sharing, toy

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_hsdp import load_hsdp_model

torch_files = pytest.importorskip("safetensors.torch")


@pytest.fixture
def checkpoint(tmp_path):
    """Of `Toy`, in two files with an index."""
    state = toy().state_dict()
    parts = ({k: v for k, v in state.items() if ("1" in k) is one} for one in (False, True))
    listed = {}
    for number, part in enumerate(parts, 1):
        name = f"model-0000{number}-of-00002.safetensors"
        torch_files.save_file(part, tmp_path / name)
        listed |= dict.fromkeys(part, name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    return tmp_path


def second(folder):
    return folder / "model-00002-of-00002.safetensors"


def error_of(folder, cls=Toy, **options):
    with sharing(1), pytest.raises(ParallelConfigError) as caught:
        load_hsdp_model(cls, folder, config(), **options)
    return str(caught.value)


def test_a_plain_class_loads_with_its_buffers(checkpoint):
    with sharing(1):
        loaded = load_hsdp_model(Toy, checkpoint, config())
        assert torch.equal(loaded(seeded(2, 6)), toy()(seeded(2, 6)))


def test_a_folder_that_is_not_there(tmp_path):
    unet = pytest.importorskip("diffusers").UNet2DConditionModel
    said = error_of(tmp_path / "absent", unet)
    assert "absent has none of" in said
    assert "Name a folder on this machine" in said


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "weights.bin").touch()
    message = error_of(tmp_path)
    assert "diffusion_pytorch_model.safetensors" in message
    assert "there is: weights.bin" in message
    assert "there is: nothing" in error_of(tmp_path / "absent")


def test_a_variant_that_is_not_there(checkpoint):
    assert "model.fp16.safetensors" in error_of(checkpoint, variant="fp16")


def test_a_file_that_the_index_names_is_missing(checkpoint):
    second(checkpoint).unlink()
    assert second(checkpoint).name in error_of(checkpoint)


@pytest.mark.parametrize("kept", [0, 5, 200, -10])
def test_a_truncated_file(checkpoint, kept):
    data = second(checkpoint).read_bytes()
    second(checkpoint).write_bytes(data[:kept])
    message = error_of(checkpoint)
    assert second(checkpoint).name in message
    assert "damaged" in message


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 1}'])
def test_a_broken_index(checkpoint, text):
    (checkpoint / "model.safetensors.index.json").write_text(text)
    assert "no index" in error_of(checkpoint)


def test_a_tensor_that_the_index_lists_is_in_no_file(checkpoint):
    state = torch_files.load_file(second(checkpoint))
    del state["blocks.1.up.bias"]
    torch_files.save_file(state, second(checkpoint))
    assert "blocks.1.up.bias" in error_of(checkpoint)


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(tmp_path):
    state = toy().state_dict()
    del state["stem.bias"], state["blocks.2.up.weight"]
    state |= {"extra.a": torch.ones(2), "extra.b": torch.ones(2), "head.bias": torch.ones(4)}
    torch_files.save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    message = error_of(tmp_path)
    assert "missing (2): stem.bias, blocks.2.up.weight" in message
    assert "unexpected (2): extra.a, extra.b" in message
    assert "head.bias is [4] in the checkpoint, [5] in the model" in message


class Renamed(Toy):
    """As classes of transformers are that rename keys."""

    base_model_prefix = "net"
    _checkpoint_conversion_mapping = {r"^layers\.": "blocks."}  # noqa: RUF012 - as theirs


def test_keys_are_renamed_as_the_class_says(tmp_path):
    state = {key.replace("blocks.", "layers."): value for key, value in toy().state_dict().items()}
    torch_files.save_file(state, tmp_path / "model.safetensors")
    with sharing(1):
        loaded = load_hsdp_model(Renamed, tmp_path, config())
        assert torch.equal(loaded(seeded(2, 6)), toy()(seeded(2, 6)))


def test_the_base_of_a_model_with_a_head(tmp_path):
    state = {f"net.{key}": value for key, value in toy().state_dict().items()}
    torch_files.save_file(state | {"lm.bias": torch.ones(2)}, tmp_path / "model.safetensors")
    with sharing(1):
        loaded = load_hsdp_model(Renamed, tmp_path, config())
        assert torch.equal(loaded(seeded(2, 6)), toy()(seeded(2, 6)))
    torch_files.save_file(state | {"net.odd": torch.ones(2)}, tmp_path / "model.safetensors")
    assert "unexpected (1): net.odd" in error_of(tmp_path, Renamed)


def test_keys_that_the_class_does_not_rename(tmp_path):
    state = {f"other.{key}": value for key, value in toy().state_dict().items()}
    torch_files.save_file(state, tmp_path / "model.safetensors")
    assert "if from_pretrained() does more for this class" in error_of(tmp_path, Renamed)


def test_two_tensors_for_one_weight(tmp_path):
    state = toy().state_dict()
    state |= {"net.stem.bias": torch.ones(6)}
    torch_files.save_file(state, tmp_path / "model.safetensors")
    assert "unexpected (1): net.stem.bias" in error_of(tmp_path, Renamed)


def test_a_class_without_its_configuration(checkpoint):
    diffusers = pytest.importorskip("diffusers")
    assert "no configuration" in error_of(checkpoint, diffusers.SD3Transformer2DModel)


def test_a_class_that_makes_no_module(checkpoint):
    assert "makes a dict" in error_of(checkpoint, dict)


def test_a_dtype_that_weights_cannot_have(checkpoint):
    assert "torch.int8" in error_of(checkpoint, dtype=torch.int8)


def test_without_the_package_that_reads_the_files(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install safetensors" in error_of(checkpoint)


def load_from(folders):
    with sharing(2):
        load_hsdp_model(Toy, folders[dist.get_rank()], config())


def test_a_file_damaged_on_one_rank_is_an_error_on_all(ranks, checkpoint, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(checkpoint, other, dirs_exist_ok=True)
    second(other).write_bytes(b"")
    found = ranks.outcomes(load_from, [checkpoint, other], world_size=2)
    assert [outcome.status for outcome in found] == ["raised", "raised"]
    assert type(found[0].exception) is ParallelError
    assert "rank 1" in str(found[0].exception)
    for outcome in found:
        assert second(other).name in str(outcome.exception)


def load_twice(folder):
    with sharing(2):
        try:
            load_hsdp_model(Toy, folder / "absent", config())
        except ParallelConfigError:
            return torch.equal(
                load_hsdp_model(Toy, folder, config())(seeded(2, 6)), toy()(seeded(2, 6))
            )


def test_ranks_can_load_again_after_an_error(ranks, checkpoint):
    assert ranks.run(load_twice, checkpoint, world_size=2) == [True, True]


def conditions_of_one(folder):
    with sharing(2):
        asked = {"conditions": ["nothing.*"]} if dist.get_rank() == 0 else {}
        with pytest.raises(ParallelError) as caught:
            load_hsdp_model(Toy, folder, config(), **asked)
        loaded = load_hsdp_model(Toy, folder, config())
        return str(caught.value), torch.equal(loaded(seeded(2, 6)), toy()(seeded(2, 6)))


def test_sharding_that_fails_on_one_rank_is_an_error_on_all(ranks, checkpoint):
    (first, works), (second, also) = ranks.run(conditions_of_one, checkpoint, world_size=2)
    assert first.startswith("no module matches")
    assert "rank 0 of [0, 1] failed; rank 0: ParallelConfigError: no module matches" in second
    assert works
    assert also
