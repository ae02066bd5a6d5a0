"""What the tests of this package share: seeded inputs, buffers with guards, coordinators."""

from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from omni_group_coordinator import GroupCoordinator

POISON = -77.0
TIMEOUT = timedelta(seconds=20)


def seeded(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random values that hold no zero and differ between seeds."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).to(torch.bool)
    if not dtype.is_floating_point:
        return torch.randint(1, 100, shape, generator=generator).to(dtype)
    values = torch.rand(shape, generator=generator) + 0.5
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (values * signs).to(dtype)


def same(actual: object, expected: Tensor) -> None:
    """Equal bit for bit, in shape and dtype too."""
    assert isinstance(actual, Tensor)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(as_bytes(actual), as_bytes(expected))


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def raised(call: Callable[[], object], kind: type[BaseException]) -> str:
    """The message of the error of exactly this type that the call raises."""
    with pytest.raises(kind) as caught:
        call()
    assert caught.type is kind
    return str(caught.value)


def everyone(*, debug: bool = False, timeout: timedelta = TIMEOUT) -> GroupCoordinator:
    """A group of all ranks of the world."""
    ranks = list(range(dist.get_world_size()))
    return GroupCoordinator(
        [ranks], dist.get_rank(), "gloo", name="all", debug=debug, timeout=timeout
    )


class Guarded:
    """A strided tensor inside a larger buffer of poison, which nobody else may write."""

    def __init__(self, values: Tensor) -> None:
        shape = [2 * size + 1 for size in values.shape]
        self.buffer = torch.full(shape, POISON, dtype=values.dtype)
        self.inside = tuple(slice(1, None, 2) for _ in shape)
        self.tensor = self.buffer[self.inside]
        self.tensor.copy_(values)
        assert not self.tensor.is_contiguous()

    def holds(self, expected: Tensor) -> None:
        """The tensor has these values and the poison around it is untouched."""
        same(self.tensor, expected)
        around = self.buffer.clone()
        around[self.inside] = POISON
        assert bool((around == POISON).all())
