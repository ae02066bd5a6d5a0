"""Tensors that arrive patch by patch give what real ones give, and wait for no more than that."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from omni_group_coordinator import split_sizes
from omni_pp.pipefusion.patch_values import Arriving, Ledger, Values
from omni_pp.pipefusion.patchwise import (
    PatchwiseTensor,
    is_pending,
    real_all,
    real_of,
    real_output,
    values_of,
)
from omni_pp.pipefusion.token_layout import TokenLayout

PATCHES = 3
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "packed": ((2, 11, 6), (1,), (1,)),
    "picture": ((2, 4, 6, 8), (2, 3), (2, 2)),
    "video": ((2, 4, 4, 6, 8), (2, 3, 4), (1, 2, 2)),
    "frames first": ((2, 4, 6, 6, 8), (1, 3, 4), (2, 2, 2)),
}
kinds = pytest.mark.parametrize("kind", SHAPES)


class Source:
    """A tensor, and what stands for it; notes which patches were asked for."""

    def __init__(self, kind: str, seed: int = 0, ledger: Ledger | None = None) -> None:
        shape, dims, sizes = SHAPES[kind]
        self.real = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        lengths = tuple(shape[dim] for dim in dims)
        tokens = math.prod(n // size for n, size in zip(lengths, sizes, strict=True))
        bounds = (0, *accumulate(split_sizes(tokens, PATCHES)))
        self.layout = TokenLayout(dims, lengths, sizes, bounds)
        self.asked: list[int] = []
        self.ledger = Ledger() if ledger is None else ledger
        takes = [partial(self._take, index) for index in range(PATCHES)]
        values = Arriving(self.ledger, self.layout, takes)
        like = torch.empty(shape, device="meta")
        self.tensor = PatchwiseTensor(values, like, torch.device("cpu"))

    def _take(self, index: int) -> Tensor:
        self.asked.append(index)
        return self.layout.patch(self.layout.flat(self.real), index).clone()


def other(kind: str) -> Tensor:
    return torch.randn(SHAPES[kind][0], generator=torch.Generator().manual_seed(5))


@kinds
def test_the_flat_form_and_back(kind: str) -> None:
    source = Source(kind)
    flat = source.layout.flat(source.real)
    assert list(flat.shape) == source.layout.flat_shape(source.real.shape)
    assert torch.equal(source.layout.whole(flat), source.real)
    parts = [source.layout.patch(flat, index) for index in range(PATCHES)]
    assert torch.equal(torch.cat(parts, dim=source.layout.axis), flat)
    for index, part in enumerate(parts):
        assert list(part.shape) == source.layout.patch_shape(source.real.shape, index)


def test_a_token_is_a_rectangle_of_the_picture() -> None:
    source = Source("picture")
    flat = source.layout.flat(source.real)
    columns = 8 // 2
    for token in (0, 3, 7):
        row, column = divmod(token, columns)
        block = source.real[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(flat[:, :, 4 * token : 4 * token + 4], block.flatten(2))


Operation = Callable[[Any, Tensor], Any]
ELEMENTWISE: dict[str, Operation] = {
    "arithmetic": lambda a, b: 3 * (a - b) + a / (b.abs() + 1) - 1,
    "scalar tensor": lambda a, b: a + torch.tensor(0.25) * a,
    "reflected": lambda a, b: b - a,
    "casts": lambda a, b: (a.to(torch.bfloat16).float() * b).double(),
    "guidance": lambda a, b: a.chunk(2)[0] + 3 * (a.chunk(2)[1] - a.chunk(2)[0]),
    "doubled": lambda a, b: torch.cat([a] * 2) * 2,
    "comparison": lambda a, b: torch.where(a > b, a, b),
    "power": lambda a, b: a**2 + a.abs().sqrt() + a.exp(),
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "of each sample": lambda a, b: a * torch.tensor([0.5, 2.0]).reshape(-1, *(1,) * (b.ndim - 1)),
    "a row": lambda a, b: a[:1] * 2,
    "a dimension less": lambda a, b: a[1].unsqueeze(0),
    "stacked": lambda a, b: torch.stack([a, b], dim=1).sum(1),
    "einsum": lambda a, b: torch.einsum(
        "k,bkc...->bc...", torch.tensor([0.3, 0.7]), torch.stack([a, 2 * a], dim=1)
    ),
    "repeated": lambda a, b: a[:1].repeat(2, *(1,) * (b.ndim - 1)),
    "expanded": lambda a, b: a[:1].expand(2, *(-1,) * (b.ndim - 1)) + b,
    "noise": lambda a, b: a + torch.zeros_like(a) + torch.randn(a.shape, dtype=a.dtype) * 0,
    "clamped": lambda a, b: torch.clamp(a, -0.5, 0.5),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ELEMENTWISE)
@kinds
def test_what_treats_each_element_alone_waits_for_nothing(kind: str, name: str, mode: Any) -> None:
    with mode():
        source, operand = Source(kind), other(kind)
        expected = ELEMENTWISE[name](source.real, operand)
        found = ELEMENTWISE[name](source.tensor, operand)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert not source.asked
        values = values_of(found)
        assert values is not None
        part = values.layout.patch(values.layout.flat(expected), 1)
        torch.testing.assert_close(values.patch(1), part)
        assert source.asked == [1]
        torch.testing.assert_close(real_of(found), expected)
        assert sorted(source.asked) == list(range(PATCHES))


def test_channels_may_meet() -> None:
    source = Source("video")
    expected = source.real / source.real.norm(dim=1, keepdim=True)
    found: Any = source.tensor / source.tensor.norm(dim=1, keepdim=True)
    assert is_pending(found)
    assert not source.asked
    assert torch.equal(real_of(found), expected)


def test_one_value_for_each_frame() -> None:
    source, scale = Source("video"), torch.arange(4.0).reshape(1, 1, 4, 1, 1)
    found: Any = source.tensor * scale
    assert is_pending(found)
    assert torch.equal(real_of(found), source.real * scale)


WHOLE: dict[str, Operation] = {
    "mean": lambda a, b: a.mean(),
    "norm": lambda a, b: a / a.flatten(1).norm(dim=1).mean(),
    "along tokens": lambda a, b: a.flip(-1 if b.ndim > 3 else 1),
    "cut along tokens": lambda a, b: a[:, :, :4] if b.ndim > 3 else a[:, :4],
    "matrix": lambda a, b: a.flatten(1) @ b.flatten(1).mT,
    "list": lambda a, b: torch.tensor(a.tolist()),
    "array": lambda a, b: torch.from_numpy(a.numpy().copy()),
    "number": lambda a, b: torch.tensor(float(a.sum())),
    "reshaped": lambda a, b: a.reshape(2, -1),
    "copied": lambda a, b: copy.deepcopy(a),
    "into": lambda a, b: b.clone().copy_(a),
    "sorted": lambda a, b: a.sort(dim=0).values,
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("kind", ["packed", "video"])
def test_anything_else_waits_for_all(kind: str, name: str) -> None:
    source, operand = Source(kind), other(kind)
    found = real_all(WHOLE[name](source.tensor, operand))
    assert torch.equal(found, WHOLE[name](source.real, operand))
    assert sorted(source.asked) == list(range(PATCHES))


@kinds
def test_changes_in_place_reach_views_and_no_earlier_result(kind: str) -> None:
    source = Source(kind)
    tensor, expected = source.tensor, source.real.clone()
    row, earlier, before = tensor[:1], tensor * 2, expected * 2
    tensor.mul_(3)
    expected.mul_(3)
    assert torch.equal(row + 0, expected[:1])
    row.add_(1)
    expected[:1].add_(1)
    tensor[1] = 7.0
    expected[1] = 7.0
    assert torch.equal(tensor + 0, expected)
    assert torch.equal(real_of(earlier), before)  # type: ignore[arg-type]


@kinds
def test_an_operand_may_change_after_it_was_used(kind: str) -> None:
    source, operand = Source(kind), other(kind)
    expected, found = source.real + operand, source.tensor + operand
    operand.zero_()
    assert torch.equal(real_of(found), expected)  # type: ignore[arg-type]


def test_wrong_shapes_are_told_at_once() -> None:
    source = Source("packed")
    with pytest.raises(RuntimeError, match=r"broadcast|size"):
        source.tensor + torch.ones(3, 11, 6)
    assert not source.asked


def test_each_patch_is_computed_once() -> None:
    counted: list[int] = []

    source = Source("packed")
    found: Any = source.tensor + 1
    values: Any = values_of(found)
    compute = values._compute

    def counting(index: int | None) -> Tensor:
        counted.append(-1 if index is None else index)
        result: Tensor = compute(index)
        return result

    values._compute = counting
    doubled, tripled = found * 2, found * 3
    for index in (0, 2, 1):
        for one in (doubled, tripled):
            values_of(one).patch(index)  # type: ignore[union-attr]
    assert counted == [0, 2, 1]
    assert source.asked == [0, 2, 1]


def alive() -> int:
    gc.collect()
    return sum(issubclass(type(one), Values) for one in gc.get_objects())


@pytest.mark.parametrize("settles", [True, False])
def test_steps_hold_on_to_nothing(settles: bool) -> None:
    before, ledger = alive(), Ledger()
    latents: Any = torch.zeros(SHAPES["packed"][0])
    momentum: Any = latents
    counts = []
    for seed in range(8):
        noise = Source("packed", seed, ledger).tensor
        momentum = 0.5 * momentum + noise  # nothing asks for it
        latents = latents - 0.1 * momentum
        if settles:
            ledger.settle()
        counts.append(alive() - before)
        del noise
    assert (counts[-1] == counts[2]) == settles, counts


def test_outputs_hold_real_tensors() -> None:
    class Output:
        def __init__(self, images: Any) -> None:
            self.images = images

    source = Source("packed")
    found = real_output(Output([source.tensor, 3]))
    assert type(found.images[0]) is Tensor
    assert torch.equal(found.images[0], source.real)
    (again,) = real_output((Source("packed").tensor,))
    assert torch.equal(again, source.real)
