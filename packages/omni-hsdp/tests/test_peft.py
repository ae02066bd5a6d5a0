"""Adapters of peft, put on, switched, fused and taken off after a model was sharded."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from peft_files import adapter_of
from stock_sharded import CASES, randomised
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from toy_sharded import config, equal, seeded, sharing, snapshot, toy

from omni_group_coordinator import ParallelConfigError
from omni_hsdp import apply_hsdp_to_model, gathered, remove_hsdp, whole_shapes

pytest.importorskip("diffusers")
pytest.importorskip("peft")
# Those of diffusers and of peft.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


def adapter(seed: int) -> dict[str, Tensor]:
    return adapter_of(randomised(CASES["Flux"].build), seed)


def life_of(model: nn.Module, loading, changing) -> dict[str, Tensor]:
    """Outputs over the life of two adapters, by what was done before."""
    found = {}

    def after(what: str) -> None:
        found[what] = model(**CASES["Flux"].call())[0]

    after("nothing")
    for seed, name in enumerate(("one", "two")):
        with loading(model):
            model.load_lora_adapter(adapter(seed), prefix="transformer", adapter_name=name)
        after(f"loading {name}")
    model.set_adapters(["one", "two"], [0.5, 1.5])
    after("weighing both")
    model.set_adapter("two")
    after("switching")
    model.disable_adapters()
    after("disabling")
    model.enable_adapters()
    model.set_adapters(["one"], [0.7])
    with changing(model):
        model.fuse_lora(adapter_names=["one"])
        after("fusing, still gathered")
    after("fusing")
    with changing(model):
        model.unfuse_lora()
    after("unfusing")
    model.delete_adapters("one")
    model.set_adapter("two")
    after("deleting")
    with changing(model):
        model.fuse_lora(lora_scale=0.3, safe_fusing=True)
    model.unload_lora()
    after("fusing and unloading")
    return found


def both_lives(loading, shard, replicate):
    def alone(_):
        return nullcontext()

    plain, model = (randomised(CASES["Flux"].build) for _ in range(2))
    with sharing(shard, replicate):
        expected = life_of(plain, alone, alone)
        apply_hsdp_to_model(model, config(shard, replicate))
        found = life_of(model, loading, lambda model: gathered(model, write=True))
        still = all(isinstance(p, DTensor) for p in model.parameters())
        remove_hsdp(model)
        rest = all(
            torch.equal(a, b)
            for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
        )
        wrong = [what for what, output in found.items() if not equal(output, expected[what])]
        return wrong, still, rest, len({float(output.sum()) for output in expected.values()})


@pytest.mark.parametrize(
    ("loading", "shard", "replicate"),
    [(whole_shapes, 2, 1), (whole_shapes, 2, 2), (gathered, 2, 1)],
    ids=["without gathering", "2 x 2", "gathered"],
)
def test_adapters_act_as_on_one_rank(ranks, loading, shard, replicate):
    size = shard * replicate
    for found in ranks.run(both_lives, loading, shard, replicate, world_size=size):
        wrong, still, rest, different = found
        assert wrong == []
        assert still
        assert rest
        assert different >= 8


def shown(shape):
    model = toy()
    with sharing(2):
        apply_hsdp_to_model(model, config(param_dtype=torch.bfloat16))
        shares = dict(model.named_parameters())
        try:
            with whole_shapes(model) as same:
                assert same is model
                weights = dict(model.named_parameters())
                held = sum(p.untyped_storage().nbytes() for p in weights.values())
                with pytest.raises(RuntimeError, match="single memory location"):
                    weights["head.weight"].data += 1
                raise ArithmeticError
        except ArithmeticError:
            pass
        back = all(shares[n] is p for n, p in model.named_parameters())
        whole = {n: (p.shape, p.dtype) for n, p in weights.items()}
        none = all(p.isnan().all() for p in weights.values())
        return back, none, whole == shape, held


def test_shapes_take_no_memory_and_shares_are_back_even_after_an_error(ranks):
    whole = toy().bfloat16()
    shape = {n: (p.shape, p.dtype) for n, p in whole.named_parameters()}
    count = len(shape)
    assert ranks.run(shown, shape, world_size=2) == [(True, True, True, 2 * count)] * 2


def test_what_is_not_sharded_has_its_shapes():
    with pytest.raises(ParallelConfigError, match="not sharded"):
        whole_shapes(toy()).__enter__()


def saved_while_gathered():
    model = toy()
    with sharing(2):
        expected = {key: value.clone() for key, value in model.state_dict().items()}
        apply_hsdp_to_model(model, config())
        model(seeded(2, 6))  # torch adds some in the first call
        hooks = snapshot(model)["hooks"]
        with whole_shapes(model):
            pass
        with gathered(model):
            inside = {key: value.clone() for key, value in model.state_dict().items()}
        shares = model.state_dict()
        return (
            all(torch.equal(inside[key], value) for key, value in expected.items()),
            sorted(expected) == sorted(shares),
            all(isinstance(p, DTensor) for p in shares.values() if p.ndim > 1),
            snapshot(model)["hooks"] == hooks,
        )


def test_the_state_of_a_gathered_model_is_whole_and_that_of_a_sharded_one_its_shares(ranks):
    assert ranks.run(saved_while_gathered, world_size=2) == [(True,) * 4] * 2
