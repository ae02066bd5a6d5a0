"""Parameters that are not sharded, and stay right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from toy_sharded import Block, Toy, config, differences, seeded, sharing, snapshot, toy

from omni_group_coordinator import ParallelConfigError
from omni_hsdp import apply_hsdp_to_model, hsdp_report, load_hsdp_model, remove_hsdp

CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "packed": torch.uint8}


class Quantized(nn.Module):
    """Adds what its codes and its scalar stand for: a block with every kind of parameter."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        values = torch.randn(width, width) * 3
        for name, dtype in CODES.items():
            codes = values.abs() if dtype is torch.uint8 else values
            self.register_parameter(name, nn.Parameter(codes.to(dtype), requires_grad=False))
        self.scalar = nn.Parameter(torch.tensor(0.75))
        self.scale = nn.Parameter(torch.rand(width))
        self.none = nn.Parameter(torch.empty(0, 3))
        self.turned = nn.Parameter(torch.randn(3, width).T)

    def forward(self, x: Tensor) -> Tensor:
        for name in CODES:
            x = x + self.linear(x) @ getattr(self, name).to(x.dtype) * self.scale
        return x * self.scalar + self.turned.sum(1)


class Mixed(Toy):
    def __init__(self) -> None:
        super().__init__(1)
        self.blocks = nn.ModuleList(Quantized() for _ in range(2))


def mixed() -> Mixed:
    torch.manual_seed(5)
    return Mixed().eval()


WHOLE = {"fp8", "int8", "packed", "scalar", "none", "turned"}


def shard_mixed(param_dtype):
    model, x = mixed(), seeded(2, 6)
    with sharing(2):
        expected, before = model(x), snapshot(model)
        apply_hsdp_to_model(model, config(param_dtype=param_dtype))
        whole = {n for n, p in model.named_parameters() if not isinstance(p, DTensor)}
        found = [torch.equal(model(x), expected) for _ in range(2)]
        dtypes = {n: p.dtype for n, p in model.blocks[0].named_parameters()}
        reasons = {p.name: p.reason for p in hsdp_report(model).whole}
        remove_hsdp(model)
        return found, whole, dtypes, reasons, differences(before, snapshot(model))


@pytest.mark.parametrize("param_dtype", [None, torch.bfloat16], ids=["None", "default"])
def test_codes_scalars_and_other_odd_ones_stay_whole_and_right(ranks, param_dtype):
    for found, whole, dtypes, reasons, rest in ranks.run(shard_mixed, param_dtype, world_size=2):
        assert found == [True, True]
        assert whole == {f"blocks.{i}.{name}" for i in range(2) for name in WHOLE}
        assert {name: dtypes[name] for name in CODES} == CODES
        assert reasons.keys() == whole
        assert reasons["blocks.0.fp8"] == "fp8: float8_e4m3fn"
        assert reasons["blocks.0.packed"] == "not floating-point: uint8"
        assert reasons["blocks.0.scalar"] == "a scalar"
        assert rest == []


def load_mixed(folder):
    expected = mixed()
    with sharing(2):
        loaded = load_hsdp_model(Mixed, folder, config())
        same = torch.equal(loaded(seeded(2, 6)), expected(seeded(2, 6)))
        remove_hsdp(loaded)
        flags = {n: p.requires_grad for n, p in loaded.named_parameters()}
        states = zip(loaded.state_dict().values(), expected.state_dict().values(), strict=True)
        return (
            same,
            all(a.dtype is b.dtype and torch.equal(a, b) for a, b in states),
            flags == {n: p.requires_grad for n, p in expected.named_parameters()},
        )


def test_they_are_loaded_whole(ranks, tmp_path):
    files = pytest.importorskip("safetensors.torch")
    state = {key: value.contiguous() for key, value in mixed().state_dict().items()}
    files.save_file(state, tmp_path / "model.safetensors")
    assert ranks.run(load_mixed, tmp_path, world_size=2) == [(True, True, True)] * 2


class Subclass(nn.Parameter):
    """As packages for quantization make them."""


def shard_ignored(by_attribute):
    model, x = toy(), seeded(2, 6)
    model.blocks[2].up.weight = Subclass(model.blocks[2].up.weight.detach().clone())
    names = ("head", "blocks.1.up")
    with sharing(2):
        expected = model(x)
        if by_attribute:
            model._hsdp_ignored_modules = names
        given = {} if by_attribute else {"ignored_modules": names}
        apply_hsdp_to_model(model, config(), **given)
        same = torch.equal(model(x), expected)
        return same, {p.name: p.reason for p in hsdp_report(model).whole}


@pytest.mark.parametrize("by_attribute", [True, False], ids=["attribute", "argument"])
def test_modules_named_by_dots_and_subclasses_stay_whole(ranks, by_attribute):
    for same, reasons in ranks.run(shard_ignored, by_attribute, world_size=2):
        assert same
        assert reasons == {
            "head.weight": "in the ignored module 'head'",
            "head.bias": "in the ignored module 'head'",
            "blocks.1.up.weight": "in the ignored module 'blocks.1.up'",
            "blocks.1.up.bias": "in the ignored module 'blocks.1.up'",
            "blocks.2.up.weight": "packed: a Subclass",
        }


def test_an_ignored_module_that_is_not_there_is_an_error_with_the_nearest():
    with sharing(1), pytest.raises(ParallelConfigError, match=r"'blocks.1.upp'.*blocks.1.up"):
        apply_hsdp_to_model(toy(), config(), ignored_modules=["blocks.1.upp"])


def shard_tied():
    model, x = toy(), seeded(2, 6)
    model.blocks[1].up.bias = model.blocks[0].up.bias  # of two blocks
    model.blocks[2].down.weight = nn.Parameter(torch.ones(6, 13))
    model.mask = nn.Linear(13, 6, bias=False)
    model.mask.weight = model.blocks[2].down.weight  # of a block and of what is in none
    with sharing(2):
        expected, before = model(x), snapshot(model)
        apply_hsdp_to_model(model, config())
        same = torch.equal(model(x), expected)
        tied = model.mask.weight is model.blocks[2].down.weight
        reasons = {p.name: p.reason for p in hsdp_report(model).whole}
        remove_hsdp(model)
        return same, tied, reasons, differences(before, snapshot(model))


def test_shared_parameters_stay_shared(ranks):
    for same, tied, reasons, rest in ranks.run(shard_tied, world_size=2):
        assert same
        assert tied
        assert reasons == {"blocks.0.up.bias": "shared by the blocks blocks.0, blocks.1"}
        assert rest == []


def shard_cast(dtype):
    """A model in float32 whose weights are gathered in another dtype."""
    model, reference, x = toy(), toy().to(dtype), seeded(2, 6).to(dtype)
    model.phase, model.scale = model.phase.to(dtype), model.scale.to(dtype)
    with sharing(2):
        expected = reference(x)
        before = snapshot(model)
        apply_hsdp_to_model(model, config(param_dtype=dtype))
        found = model(x)
        remove_hsdp(model)
        return found.dtype, torch.equal(found, expected), differences(before, snapshot(model))


def test_a_float32_model_is_gathered_in_the_dtype_asked_for_and_given_back_exactly(ranks):
    for dtype, same, rest in ranks.run(shard_cast, torch.bfloat16, world_size=2):
        assert dtype is torch.bfloat16
        assert same
        assert rest == []


class Kept(Block):
    """Its gate is kept in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.gate(x.float()).to(x.dtype)


class KeptToy(Toy):
    _keep_in_fp32_modules = ("gate",)

    def __init__(self) -> None:
        super().__init__(1)
        self.blocks = nn.ModuleList(Kept() for _ in range(2))


def shard_kept(loaded_in_bfloat16):
    torch.manual_seed(1)
    model = KeptToy().eval()
    x = seeded(2, 6).bfloat16()
    halved = {n: p for n, p in model.named_parameters() if "gate" not in n}
    values = {n: p.data for n, p in halved.items()}
    model.phase, model.scale = model.phase.bfloat16(), model.scale.bfloat16()
    for parameter in halved.values():
        parameter.data = parameter.data.bfloat16()
    with sharing(2):
        expected = model(x)
        if not loaded_in_bfloat16:
            for name, parameter in halved.items():
                parameter.data = values[name]
        apply_hsdp_to_model(model, config(param_dtype=torch.bfloat16))
        reasons = {p.reason for p in hsdp_report(model).whole}
        return torch.equal(model(x), expected), reasons


def test_modules_kept_in_float32_are_not_cast(ranks):
    for same, reasons in ranks.run(shard_kept, True, world_size=2):
        assert same
        assert reasons == set()
    for same, reasons in ranks.run(shard_kept, False, world_size=2):
        assert same
        assert reasons == {"kept in torch.float32 while others are cast to torch.bfloat16"}
