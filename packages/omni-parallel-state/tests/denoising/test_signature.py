"""What tells one kind of call from another, and the same inputs from others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_results import seeded

from omni_parallel_state.denoising.signature import cost, fingerprint, same_inputs, signature

X = seeded(2, 3, 4)


def key(*args: Any, **kwargs: Any) -> Any:
    return signature(args, kwargs)


DIFFERENT = [
    (key(X), key(X[:1])),
    (key(X), key(X.half())),
    (key(X), key(x=X)),
    (key(X, flag=True), key(X, flag=False)),
    (key(X, layers=[1]), key(X, layers=[1, 2])),
    (key(X, options={"a": X}), key(X, options={"b": X})),
    (key(X, options={"a": X}), key(X, options={"a": X[:1]})),
    (key(X, None), key(X, 0.5)),
    (key(X, t=None), key(X, t=3)),
    (key(X, ids=[X]), key(X, ids=[X, X])),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_what_may_decide_a_shape_tells_calls_apart(one, other):
    assert one != other
    assert hash(one) != hash(other)


def test_what_never_decides_a_shape_does_not():
    assert key(X, timestep=3) == key(X + 1, timestep=4)
    assert key(X, scale=0.5) == key(X, scale=0.75)
    assert key(a=X, b=1) == key(b=1, a=X)


def test_work_is_rows_times_tokens():
    assert cost((seeded(2, 5, 8),), {}) == 10
    assert cost((), {"latents": seeded(2, 4, 3, 6)}) == 36
    assert cost((seeded(1, 5, 8),), {"text": seeded(1, 7, 3), "t": seeded(1)}) == 12
    assert cost((seeded(1, 5, 8),), {"text": seeded(1, 9, 3)}) > cost((seeded(1, 5, 8),), {})


@pytest.mark.parametrize("args", [(seeded(5, 8),), ([seeded(5, 8)],), ()], ids=len)
def test_every_call_is_some_work(args):
    """Else one rank would be given all of them."""
    assert cost(args, {}) > 0


def alike(one: Any, other: Any) -> bool:
    return same_inputs(fingerprint((one,), {}), fingerprint((other,), {}))


def test_inputs_are_compared_but_for_rounding():
    assert alike(X, X.clone())
    assert alike(X, X * (1 + 1e-6))
    assert not alike(X, seeded(2, 3, 4, seed=1))
    assert not alike(X, -X)
    assert not alike(X, X * 1.01)
    assert not alike(X, X[:1])
    assert alike(torch.zeros(3), torch.zeros(3))
    assert not alike(torch.zeros(3), torch.full((3,), 1e-3))
    assert not same_inputs(fingerprint((X,), {}), fingerprint((X,), {"more": X}))
    assert fingerprint((torch.arange(3), "text", None), {"empty": seeded(0)}) == ()


@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min, torch.nan])
def test_masks_of_infinities_are_like_themselves(value):
    mask = torch.zeros(1, 6)
    mask[:, 3:] = value
    assert alike(mask, mask.clone())
    assert not alike(mask, torch.zeros(1, 6))


def test_inputs_of_other_seeds_are_never_taken_for_the_same():
    for shape in ((1, 4096, 64), (1, 16, 21, 60, 104), (2, 5)):
        found = [fingerprint((seeded(*shape, seed=seed),), {}) for seed in range(12)]
        for i, one in enumerate(found):
            assert [same_inputs(one, other) for other in found] == [i == j for j in range(12)]
    prompt = seeded(1, 77, 32)
    assert not same_inputs(fingerprint((prompt,), {}), fingerprint((prompt.flip(-1),), {}))
    assert same_inputs(fingerprint((prompt,), {}), fingerprint((prompt * (1 + 1e-4),), {}))
