"""What runs inside a forward pass traces under torch.compile(fullgraph=True)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from group_cases import everyone, same, seeded
from torch import Tensor

from omni_group_coordinator import (
    GroupCoordinator,
    SeqAllToAll4D,
    all_to_all_4D,
    all_to_all_5D,
    halo_exchange,
    ring_shift,
)
from rank_harness import RankPool

Forward = Callable[[GroupCoordinator, Tensor], Any]

# Each works on a tensor of shape (4, 6, 2) and calls one operation between two computations.
FORWARDS: dict[str, Forward] = {
    "all_reduce": lambda g, x: g.all_reduce(x.sin()) * 2,
    "all_reduce of a strided tensor": lambda g, x: g.all_reduce(x.sin().transpose(0, 1)) * 2,
    "all_gather": lambda g, x: g.all_gather(x.sin(), 1) * 2,
    "all_gather, separate": lambda g, x: g.all_gather(x.sin(), 1, separate_tensors=True),
    "all_gather, uneven": lambda g, x: g.all_gather(
        x[: g.rank_in_group].sin(), 0, lengths=list(range(g.world_size))
    ),
    "reduce_scatter": lambda g, x: g.reduce_scatter(x.sin(), 1) * 2,
    "reduce_scatter, uneven": lambda g, x: g.reduce_scatter(
        x.sin(), 1, lengths=[5, 1, *[0] * (g.world_size - 2)]
    ),
    "all_to_all": lambda g, x: g.all_to_all(x.sin(), 1, 0) * 2,
    "all_to_all, uneven": lambda g, x: g.all_to_all(
        x.sin(), 1, 2, scatter_lengths=[5, 1, *[0] * (g.world_size - 2)]
    ),
    "all_to_all_flat": lambda g, x: g.all_to_all_flat(
        x.sin().view(-1),
        [48, *[0] * (g.world_size - 1)],
        [48 * (g.rank_in_group == 0)] * g.world_size,
    ),
    "broadcast": lambda g, x: g.broadcast(x.sin(), 1) * 2,
    "broadcast of a strided tensor": lambda g, x: g.broadcast(x.sin().transpose(0, 1), 1) * 2,
    "ring_shift": lambda g, x: ring_shift(x.sin(), g) * 2,
    "ring_shift of a strided tensor": lambda g, x: ring_shift(x.sin().transpose(0, 1), g) * 2,
    "halo_exchange": lambda g, x: [t * 2 for t in halo_exchange(x.sin(), 0, 3, 1, g)],
    "halo_exchange, uneven": lambda g, x: halo_exchange(
        x[: g.rank_in_group + 1].sin(), 0, 2, 1, g, list(range(1, g.world_size + 1))
    ),
    "all_to_all_4D": lambda g, x: all_to_all_4D(x.sin().view(1, 4, 6, 2), group=g) * 2,
    "all_to_all_5D": lambda g, x: all_to_all_5D(x.sin().view(1, 2, 3, 2, 4)[..., 0:2], group=g) * 2,
}


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def compiled_equals_eager(names: list[str], debug: bool) -> None:
    """One graph, the same result, and the second call of the same shape compiles nothing."""
    group = everyone(debug=debug)
    for name in names:
        forward = FORWARDS[name]
        torch.compiler.reset()

        def call(x: Tensor, forward: Forward = forward) -> Any:
            return forward(group, x)

        fast = torch.compile(call, fullgraph=True, backend="aot_eager")
        for turn in range(3):
            x = seeded(10 * group.rank + turn, 4, 6, 2)
            copy = x.clone()
            stance = "default" if turn == 0 else "fail_on_recompile"
            with torch.compiler.set_stance(stance), torch.no_grad():
                got = flat(fast(x))
            for one, other in zip(got, flat(forward(group, copy)), strict=True):
                same(one.contiguous(), other.contiguous())


@pytest.mark.slow
def test_collectives_trace_in_one_graph_and_compile_once_per_shape(ranks: RankPool):
    ranks.run(compiled_equals_eager, list(FORWARDS), False)


def test_uneven_lengths_trace_on_three_ranks_also_in_debug_mode(ranks: RankPool):
    names = [name for name in FORWARDS if "uneven" in name]
    ranks.run(compiled_equals_eager, [*names, "broadcast"], True, world_size=3)


def alternating_lengths() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    group = everyone()
    counter = CompileCounterWithBackend("aot_eager")

    def call(x: Tensor) -> Tensor:
        x = all_to_all_4D(x.sin(), group=group)
        first, last = halo_exchange(x, 1, 1, 1, group)
        return ring_shift(torch.cat([first, x, last], 1).sum(1), group)

    fast = torch.compile(call, fullgraph=True, backend=counter)
    for turn, length in enumerate([6, 8, 10, 6, 12, 8, 10, 14]):
        x = seeded(10 * group.rank + turn, 1, length, 4, 2)
        torch.testing.assert_close(fast(x), call(x))
    assert counter.frame_count <= 2


def test_lengths_that_alternate_compile_twice_at_most(ranks: RankPool):
    ranks.run(alternating_lengths)


def backward() -> None:
    group = everyone()
    whole = seeded(1, 1, 6, 4, 2).requires_grad_()
    weight = seeded(2, 1, 6, 4, 2)
    (whole.sin() * weight).sum().backward()
    assert whole.grad is not None

    def call(x: Tensor, weight: Tensor) -> Tensor:
        out: Any = SeqAllToAll4D.apply(group, x, 2, 1)
        return (out.sin() * weight).sum()

    fast = torch.compile(call, fullgraph=True, backend="aot_eager")
    shard = whole.detach().chunk(2, 1)[group.rank].clone().requires_grad_()
    fast(shard, weight.chunk(2, 2)[group.rank].contiguous()).backward()
    assert shard.grad is not None
    same(shard.grad, whole.grad.chunk(2, 1)[group.rank])


# torch's own: dynamo makes an instance of each autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
def test_the_differentiable_all_to_all_traces_with_its_backward(ranks: RankPool):
    ranks.run(backward)


def check_operators() -> None:
    group = everyone()
    assert group.checked is not None
    key, other = group.checked.key, 1 - group.rank
    x = seeded(group.rank, 3, 2)
    ops = torch.ops.omni_group_coordinator
    samples = [
        (ops.shift.default, (x, key, [3, 2])),
        (ops.shift.default, (seeded(1, 2 + group.rank, 3), key, [2 + other, 3])),
        (ops.halo.default, (x, key, 0, 2, 1, [3, 3])),
        (ops.halo.default, (x.t(), key, 1, 4, 4, [3, 3])),
        (ops.broadcast.default, (x, key, 1)),
    ]
    for op, arguments in samples:
        torch.library.opcheck(op, arguments)


def test_the_operators_pass_opcheck(ranks: RankPool):
    ranks.run(check_operators)


def after_destroy() -> None:
    group = everyone()
    assert group.checked is not None
    key = group.checked.key
    fast = torch.compile(lambda x: ring_shift(x, group) * 2, fullgraph=True, backend="aot_eager")
    fast(seeded(1, 3))
    group.destroy()
    with pytest.raises(Exception, match="was destroyed; build a new one"):
        fast(seeded(1, 3))
    with pytest.raises(RuntimeError, match=f"group '{key}' no longer exists; compile the model"):
        torch.ops.omni_group_coordinator.shift(seeded(1, 3), key, [3])


def test_a_compiled_call_after_destroy_is_an_error(ranks: RankPool):
    ranks.run(after_destroy)
