"""What stands for a prediction does as the prediction would, and waits where it can."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from toy_results import Output, seeded
from toy_round import Round

from omni_group_coordinator import ParallelError
from omni_parallel_state.denoising.waiting import arrived, is_deferred, resolve


def same(found: Any, expected: Any) -> None:
    found = resolve(found)
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, tuple | list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


X = seeded(2, 6, 8, seed=1)
MASK = X > 0

WAITING: dict[str, Callable[[Any], Any]] = {
    "item": lambda p: p[0],
    "rows": lambda p: p[:, 1:3],
    "ellipsis": lambda p: p[..., None, ::2],
    "index": lambda p: p[torch.tensor([1, 0])],
    "mask": lambda p: p[MASK],
    "to": lambda p: p.to(torch.float16),
    "to, named": lambda p: p.to(dtype=torch.float64, copy=True),
    "float": lambda p: p.float(),
    "half": lambda p: p.half().float(),
    "bfloat16": lambda p: p.bfloat16(),
    "double": lambda p: p.double(),
    "type as": lambda p: p.type_as(X.half()),
    "contiguous": lambda p: p.transpose(1, 2).contiguous(),
    "clone": lambda p: p.clone(),
    "detach": lambda p: p.detach(),
    "squeeze": lambda p: p.unsqueeze(0).squeeze(0),
    "view": lambda p: p.view(2, -1),
    "reshape": lambda p: p.reshape(-1).unflatten(0, (3, 32)),
    "flatten": lambda p: p.flatten(1),
    "permute": lambda p: p.permute(2, 0, 1).movedim(0, 1),
    "expand": lambda p: p[:, :, :1].expand(-1, -1, 5).repeat(1, 2, 1),
    "plus": lambda p: p + 1.5,
    "plus a tensor": lambda p: p + X,
    "a tensor plus": lambda p: X + p,
    "minus": lambda p: 2 - (p - X),
    "a tensor minus": lambda p: X - p,
    "times": lambda p: 3 * p * X,
    "a tensor times": lambda p: X * p,
    "over": lambda p: p / 4,
    "a tensor over": lambda p: X / p,
    "one over": lambda p: 1 / p,
    "power": lambda p: p**2,
    "to a power": lambda p: 2**p,
    "a tensor to a power": lambda p: X.abs() ** p,
    "minus all": lambda p: -p,
    "abs": lambda p: abs(p).abs(),
    "with itself": lambda p: p * p,
    "methods": lambda p: p.add(X).sub(1).mul(X).div(2).neg(),
    "methods, alpha": lambda p: p.add(X, alpha=3),
    "functions": lambda p: torch.add(torch.mul(p, X), torch.sub(X, p)),
    "rsub": lambda p: torch.rsub(p, 1),
    "cat": lambda p: torch.cat([X, p, p], dim=1),
    "stack": lambda p: torch.stack((p, X), 1),
    "where": lambda p: torch.where(MASK, p, X),
    "lerp": lambda p: torch.lerp(X, p, 0.25),
    "reshaped function": lambda p: torch.flatten(torch.permute(p, (0, 2, 1)), 1),
    "guidance": lambda p: X + 7.5 * (p - X),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_needs_one_prediction_alone_waits_for_it(name):
    value = seeded(2, 6, 8)
    expected = WAITING[name](value)
    later = Round(value.clone())
    found = WAITING[name](later.predictions[0])
    assert is_deferred(found)
    assert later.flushes == 0
    same(found, expected)
    assert later.flushes == 1
    same(WAITING[name](later.predictions[0]), expected)  # now that it is there


def test_the_sample_of_an_output_waits():
    later = Round(Output(X))
    found = later.predictions[0].sample[:, 0] * 2
    assert later.flushes == 0
    same(found, X[:, 0] * 2)


@settings(deadline=None)
@given(st.lists(st.sampled_from(sorted(WAITING)), max_size=6), st.integers(0, 5))
def test_operations_in_a_row_give_what_they_would_give(names, needed_after):
    value = seeded(2, 6, 8)
    later = Round(value.clone())
    found, expected = later.predictions[0], value
    for index, name in enumerate(names):
        try:
            wanted = WAITING[name](expected)
        except (RuntimeError, IndexError, TypeError):  # of shapes that do not fit
            continue
        if index == needed_after:
            later.flush()
        found, expected = WAITING[name](found), wanted
    assert torch.equal(resolve(found).nan_to_num(), expected.nan_to_num())


def in_place(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A change of the prediction itself, and then what the prediction is."""

    def changed(p: Any) -> Any:
        found = change(p)
        return p if found is None else (found, p)

    return changed


def set_rows(p: Any) -> None:
    p[:, 0] = 5.0


def out_of(p: Any) -> Any:
    out = torch.empty_like(X)
    torch.add(X, p, out=out)
    return out


def into_real(p: Any) -> Any:
    x = X.clone()
    x += p
    x[:, 0] = p[:, 1]
    x[:, 2:3].copy_(p[:, 2:3])
    x.add_(p)
    return x


def times(p: Any) -> Any:
    p *= 2
    return p


def swapped(one: Any, other: Any) -> Any:
    return other, one


def caught(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


PROMPT: dict[str, Callable[[Any], Any]] = {
    "isinstance": lambda p: (isinstance(p, list), isinstance(p, tuple)),
    "shape": lambda p: (p.shape, p.size(), p.size(0), p.ndim, p.numel(), p.dim()),
    "dtype": lambda p: (p.dtype, p.device.type, p.requires_grad, p.is_floating_point()),
    "iteration": list,
    "unpacking": lambda p: swapped(*p),
    "len": len,
    "bool": lambda p: bool(p[0, 0, 0]),
    "numbers": lambda p: (float(p[0, 0, 0]), int(p[0, 0, 0]), complex(p[1, 0, 0])),
    "item of one": lambda p: p[0, 0, 0].item(),
    "repr": lambda p: (repr(p), str(p), f"{p}", f"{p[0, 0, 0]:.3f}"),
    "comparison": lambda p: (p > X, p <= 0, p == X, p != X, p.lt(0.5)),
    "reversed comparison": lambda p: (p > X, X < p, 0 >= p),  # noqa: SIM300
    "contains": lambda p: 5.25 in p,
    "logic": lambda p: ((p > 0) & MASK, MASK | (p > 0), ~(p > 0)),
    "division": lambda p: (p // 2, p % 3, 2 // p),
    "matmul": lambda p: (p @ X.mT, X.mT @ p),
    "in place": times,
    "in place, by method": in_place(lambda p: p.mul_(2)),
    "setting": in_place(set_rows),
    "out": out_of,
    "into a real one": into_real,
    "chunk": lambda p: p.chunk(2, dim=1),
    "split": lambda p: torch.split(p, 3, dim=1),
    "equal": lambda p: (torch.equal(p, X), torch.equal(X, p), torch.allclose(p, p)),
    "norm": lambda p: (p.norm(dim=-1), torch.norm(p), p.std(), p.mean(dim=(1, 2))),
    "torch": lambda p: (torch.exp(p), torch.clamp(p, -1, 1), torch.zeros_like(p)),
    "layers": lambda p: functional.linear(p, X[0]),
    "as an index": lambda p: X[p > 0],
    "copy": copy.copy,
    "deepcopy": lambda p: copy.deepcopy({"a": [p]})["a"],
    "pickle": lambda p: pickle.loads(pickle.dumps(p)),
    "numpy": lambda p: (p.numpy(), np.asarray(p), p.cpu().numpy(), np.stack([p, p])),
    "to its dtype": lambda p: (X.half().to(p), X.to(p.dtype), torch.from_dlpack(p)),
    "by numpy": lambda p: (np.float32(2) * p, p * np.float64(2), np.sqrt(np.abs(p))),
    "attributes": lambda p: (p.T.shape, p.data, p.mT, hasattr(p, "nothing"), type(p.grad)),
    "hash": lambda p: hash(p) == hash(p),
    "max": lambda p: tuple(p.max(dim=1)),
    "reversed": reversed,
    "shift": lambda p: (p.int() << 1, p.int() >> 1, 1 << p.int().abs().clamp(max=3)),
    "attribute error": lambda p: caught(lambda: p.nothing),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The use of `x.T` on tensors")
@pytest.mark.parametrize("name", PROMPT)
def test_anything_else_has_it_arrive_and_gives_the_same(name):
    value = seeded(2, 6, 8)
    expected = PROMPT[name](value.clone())
    later = Round(value.clone())
    found = PROMPT[name](later.predictions[0])
    assert later.flushes == 1
    assert arrived(later.predictions[0])
    same(found, expected)


def test_setting_an_attribute_reaches_the_prediction():
    later = Round(value := X.clone())
    later.predictions[0].data = X * 2
    assert torch.equal(value, X * 2)
    later.predictions[0].mark = "kept"
    assert value.mark == "kept"


def test_two_predictions_arrive_in_one_flush_when_they_meet():
    values = [seeded(2, 6, 8, seed=seed) for seed in (3, 4)]
    for meet in (operator.sub, torch.add, lambda a, b: torch.cat([a, b])):
        later = Round(*(value.clone() for value in values))
        one, other = (2 * prediction.float() for prediction in later.predictions)
        assert later.flushes == 0
        found = meet(one, other)
        assert later.flushes == 1
        same(found, meet(2 * values[0], 2 * values[1]))


def test_one_that_is_kept_over_rounds_goes_on():
    first = Round(X.clone())
    kept, double = first.predictions[0], 2 * first.predictions[0]
    first.flush()
    second = Round(MASK.float())
    found = double - kept * second.predictions[0]
    assert is_deferred(found)
    assert (first.flushes, second.flushes) == (1, 0)
    same(found, 2 * X - X * MASK.float())


def test_views_of_it_are_views():
    later = Round(value := X.clone())
    view = later.predictions[0].view(-1)
    view += 1
    assert torch.equal(value, X + 1)


def test_what_was_never_computed_is_an_error():
    class Broken(Round):
        def flush(self) -> None:
            self.flushes += 1

    with pytest.raises(ParallelError, match="an earlier call was never computed"):
        _ = (2 * Broken(X).predictions[0]).shape


def test_it_is_never_taken_for_the_memory_of_a_tensor():
    (prediction,) = Round(X).predictions
    assert not isinstance(prediction, Tensor)
    assert not torch.is_tensor(prediction)
    # By its numpy array, as anything else that is no tensor; or not at all.
    assert torch.equal(torch.as_tensor(prediction), X)
    with pytest.raises(TypeError):
        seeded(2, 6, 8).data = prediction
