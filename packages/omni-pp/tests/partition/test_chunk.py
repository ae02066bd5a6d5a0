"""What a chunk's call does beside computing: what it asks for, hands out, and leaves behind."""

from __future__ import annotations

import copy
from typing import Any

import partition_toys as toys
import pytest
import torch
from partition_case import randomised
from partition_flow import all_stages, assert_equal, run_chunks
from partition_images import flux, flux_call
from torch import Tensor, nn

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_pp.partition import PartitionedModel, partition_model


def part_of_toy(stage: int, model: nn.Module | None = None, **options: Any) -> PartitionedModel:
    return partition_model(model or toys.Toy(), 2, stage=stage, points=[2], **options)


def contents(part: PartitionedModel) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in part.model.named_modules()]


def run(part: PartitionedModel, receive: Any = None, send: Any = None, **kwargs: Any) -> Any:
    with torch.no_grad():
        return part.chunks[0].run(part.model, [toys.toy_input()], kwargs, receive, send)


def test_what_a_chunk_is() -> None:
    parts = all_stages(toys.Toy(), 2, virtual_stages=2, points=[1, 3, 4])
    chunks = [chunk for part in parts for chunk in part.chunks]
    assert [chunk.index for chunk in chunks] == [0, 2, 1, 3]
    assert [chunk.blocks for chunk in chunks] == [
        range(1),
        range(3, 4),
        range(1, 3),
        range(4, 5),
    ]
    assert [chunk.is_first for chunk in chunks] == [True, False, False, False]
    assert [chunk.is_last for chunk in chunks] == [False, False, False, True]
    assert repr(chunks[2]) == "Chunk(1: blocks.1 to blocks.2)"


def test_receiving_waits_until_embedders_ran() -> None:
    part, events = part_of_toy(1), []
    part.model.embed.register_forward_hook(lambda *_: events.append("embedded"))
    part.model.blocks.get_submodule("2").register_forward_hook(lambda *_: events.append("block"))

    def receive() -> Tensor:
        events.append("received")
        return torch.ones(3, 8)

    run(part, receive)
    assert events == ["embedded", "received", "block"]


def test_nothing_runs_after_the_last_block() -> None:
    """And what it sends goes out when the lists are as they were, so that sending may fail."""
    part, sent = part_of_toy(0), []
    before = contents(part)
    part.model.head.register_forward_hook(lambda *_: pytest.fail("the head ran"))

    def send(tree: Tensor) -> None:
        assert contents(part) == before
        sent.append(tree)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        run(part, None, send)
    assert len(sent) == 1
    assert contents(part) == before


@pytest.mark.parametrize("stage", [0, 1])
def test_a_block_that_raises(stage: int) -> None:
    part = part_of_toy(stage)
    before = contents(part)

    def fail(*_: Any) -> None:
        msg = "out of memory"
        raise RuntimeError(msg)

    hook = part.blocks_of(stage)[-1][1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(part, lambda: torch.ones(3, 8), lambda tree: pytest.fail("sent"))
    assert contents(part) == before
    hook.remove()
    sent: list[Tensor] = []
    result = run(part, lambda: torch.ones(3, 8), sent.append)
    assert (result is None) == (stage == 0)


def test_receiving_that_fails() -> None:
    part = part_of_toy(1)
    before = contents(part)
    with pytest.raises(ConnectionError):
        run(part, lambda: (_ for _ in ()).throw(ConnectionError()))
    assert contents(part) == before


def test_a_forward_that_catches_everything() -> None:
    class Careful(toys.Toy):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            try:
                for block in self.blocks:
                    x = block(x)
            except Exception:
                x = x * 0
            return self.head(x)

    model = Careful()
    x = toys.toy_input()
    with torch.no_grad():
        assert torch.equal(run_chunks(all_stages(model, 3), x), model(x))


def test_arguments_are_not_used_up() -> None:
    class Popping(toys.Toy):
        def forward(self, x: Tensor, options: dict[str, Any]) -> Tensor:
            x = self.embed(x) * options.pop("scale")
            for block in self.blocks:
                x = block(x)
            return self.head(x) * options["inner"].pop()

    model, options = Popping(), {"scale": 2.0, "inner": [1.0, 3.0]}
    x = toys.toy_input()
    with torch.no_grad():
        expected = model(x, copy.deepcopy(options))
        parts = all_stages(model, 1, virtual_stages=3)
        assert torch.equal(run_chunks(parts, x, options), expected)
        assert torch.equal(run_chunks(parts, x, options=options), expected)
    assert options == {"scale": 2.0, "inner": [1.0, 3.0]}


def test_hooks_of_the_model_run() -> None:
    model = toys.Toy()
    model.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    model.register_forward_hook(lambda _, args, output: output + 1)
    x = toys.toy_input()
    with torch.no_grad():
        assert torch.equal(run_chunks(all_stages(model, 2), x), model(x))


def test_hooks_of_blocks_run_and_see_their_blocks() -> None:
    model, seen = toys.Toy(), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, *_: seen.append(type(module)))
        block.register_forward_hook(lambda module, args, output: output * 1.5)
    x = toys.toy_input()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(run_chunks(all_stages(model, 2, virtual_stages=2), x), expected)
    assert seen == [toys.ToyBlock] * 10


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about itself
@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_compiled_blocks(how: str) -> None:
    model = toys.Toy()
    x = toys.toy_input()
    for key, block in list(model.blocks.named_children()):
        if how == "in place":
            block.compile(backend="eager")
        else:
            model.blocks._modules[key] = torch.compile(block, backend="eager")
    with torch.no_grad():
        expected = model(x)
        parts = [partition_model(model, 1, stage=0, virtual_stages=3)]
        assert torch.equal(run_chunks(parts, x), expected)
        parts[0].restore()
        assert torch.equal(model(x), expected)


def test_a_block_that_is_replaced_after_the_cut() -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * 2

    x = toys.toy_input()
    whole = toys.Toy()
    whole.blocks[3] = Doubled(whole.blocks[3])
    parts = all_stages(toys.Toy(), 2, points=[2])
    listed = parts[1].model.blocks._modules
    listed["3"] = Doubled(listed["3"])
    with torch.no_grad():
        assert torch.equal(run_chunks(parts, x), whole(x))
    parts[1].restore()
    assert isinstance(parts[1].model.blocks[3], Doubled)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
def test_lora_layers_and_their_scale() -> None:
    """The scale is an argument of the call that diffusers applies to all layers it can see."""
    peft = pytest.importorskip("peft")
    model = flux()
    model.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "proj_out"], init_lora_weights=False)
    )
    model = randomised(lambda: model)
    call = flux_call()
    with torch.no_grad():
        plain = model(**call)
        scaled = model(**call, joint_attention_kwargs={"scale": 0.25})
        assert not torch.equal(plain.sample, scaled.sample)
    for parts in (all_stages(model, 3), all_stages(model, 1, virtual_stages=7)):
        found = run_chunks(parts, **call, joint_attention_kwargs={"scale": 0.25})
        assert_equal(found, scaled)
        assert_equal(run_chunks(parts, **call), plain)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
def test_an_adapter_that_is_added_after_the_cut() -> None:
    peft = pytest.importorskip("peft")
    model = randomised(flux)
    part = partition_model(model, 2, stage=1)
    config = peft.LoraConfig(r=2, target_modules=["to_q"])
    part.model.add_adapter(config)
    keys = [key for key in part.model.state_dict() if "lora_A" in key]
    own = tuple(name for name, _ in part.blocks_of(1))
    assert keys
    assert all(key.startswith(own) for key in keys)


def test_missing_ends() -> None:
    with pytest.raises(ParallelConfigError, match="chunk 0 needs send"):
        run(part_of_toy(0))
    with pytest.raises(ParallelConfigError, match="chunk 1 needs receive"):
        run(part_of_toy(1))


@pytest.mark.parametrize("stage", [0, 1])
def test_a_call_that_does_not_go_through_the_blocks(stage: int) -> None:
    part = part_of_toy(stage)
    with pytest.raises(ParallelError, match="without going through all blocks of Chunk"):
        part.chunks[0].run(lambda x: x, [1], {}, lambda: 1, lambda tree: pytest.fail("sent"))


def test_a_forward_that_passes_twice() -> None:
    part = part_of_toy(1)
    before = contents(part)
    x = toys.toy_input()
    with pytest.raises(ParallelError, match=r"calls blocks\.1 more than once"):
        part.chunks[0].run(
            lambda: part.model(x) + part.model(x), (), {}, lambda: torch.ones(3, 8), None
        )
    assert contents(part) == before


def test_one_chunk_at_a_time() -> None:
    part = part_of_toy(1)
    with pytest.raises(ParallelError, match="only one at a time"):
        run(part, lambda: run(part, lambda: torch.ones(3, 8)))
    assert run(part, lambda: torch.ones(3, 8)) is not None


def test_chunks_of_two_models_within_each_other() -> None:
    inner, outer = part_of_toy(0), part_of_toy(1)
    sent: list[Tensor] = []

    def receive() -> Tensor:
        run(inner, None, sent.append)
        return sent[0]

    with torch.no_grad():
        assert torch.equal(run(outer, receive), toys.Toy()(toys.toy_input()))


def test_the_lists_stay_the_same_objects() -> None:
    model = toys.Toy()
    blocks = model.blocks
    part = part_of_toy(0, model)
    run(part, None, lambda tree: None)
    assert model.blocks is blocks
    assert list(blocks._modules) == ["0", "1"]
