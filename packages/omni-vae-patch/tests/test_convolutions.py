"""A convolution on shards gives the rows of the whole, whatever its kernel, stride and padding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_vaes import error, everyone, on_shards, part_of, random
from torch import Tensor, nn
from torch.nn.functional import pad

from omni_vae_patch.spatial.convolutions import least_rows, shard_convolution
from omni_vae_patch.spatial.partition import HEIGHT, WIDTH, partition


@dataclass(frozen=True)
class Case:
    """A convolution whose output is in step with its input, and the input.

    Attributes:
        kernel, stride, dilation, padding: For each side, frames first if there are frames.
        mode: Of the padding.
        groups: Of the channels.
        caller: What the caller pads each side of space with, before and after.
        rows: Of the coarser of input and output, along the side that is sharded.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...] | str
    mode: str = "zeros"
    groups: int = 1
    caller: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    rows: int = 9
    dim: int = HEIGHT
    bias: bool = True

    def module(self) -> Any:
        make = {2: nn.Conv2d, 3: nn.Conv3d}[len(self.kernel)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            module = make(
                4,
                8,
                self.kernel,
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                groups=self.groups,
                bias=self.bias,
                padding_mode=self.mode,
            )
        return module.requires_grad_(False)

    def input(self) -> Tensor:
        sides = [12 * self.stride[-2], 12 * self.stride[-1]]
        sides[self.dim] = self.rows * self.stride[self.dim]
        frames = [4] if len(self.kernel) == 3 else []
        return random(2, 4, *frames, *sides)

    def padded(self, x: Tensor) -> Tensor:
        (top, bottom), (left, right) = self.caller
        return pad(x, (left, right, top, bottom))


@torch.no_grad()
def errors(cases: list[Case]) -> list[float]:
    """Of this rank's part of each case; the module is as before afterwards."""
    group, found = everyone(), []
    for case in cases:
        module, x = case.module(), case.input()
        rows = partition(case.rows, group.world_size, case.dim, least_rows(module))
        whole = module(case.padded(x))
        assert whole.shape[case.dim] == case.rows
        before = set(vars(module))

        def call(part: Tensor, case: Case = case, module: Any = module) -> Tensor:
            return module(case.padded(part))

        got = on_shards(group, module, shard_convolution, call, x, rows)
        expected = part_of(whole, rows, group.rank_in_group, 1)
        found.append(0.0 if got is None else error(got, expected))
        assert set(vars(module)) == before
    return found


def check(ranks: Any, cases: list[Case], world_size: int) -> None:
    for found in ranks.run(errors, cases, world_size=world_size):
        for case, off in zip(cases, found, strict=True):
            assert off <= 1e-5, case


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """One whose rows stay in step; the kernel reaches no further than the rows of a shard."""
    ndim = draw(st.sampled_from([2, 3]))
    sides = [_side(draw) for _ in range(ndim)]
    kernel, stride, dilation, padding = zip(*sides, strict=True)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate"]))
    if ndim == 3 and mode == "reflect":  # of four frames
        padding = (min(padding[0], 3), *padding[1:])
    if ndim == 3:  # frames are not in step with anything, but there must be one
        kernel, dilation = (min(kernel[0], 3), *kernel[1:]), (1, *dilation[1:])
    case = Case(
        kernel,
        stride,
        dilation,
        padding,
        mode,
        draw(st.sampled_from([1, 2, 4])),
        dim=draw(st.sampled_from([HEIGHT, WIDTH])),
        bias=draw(st.booleans()),
    )
    return replace(case, rows=draw(st.integers(least_rows(case.module()), 13)))


def _side(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Kernel, stride, dilation and padding of a side, so that the output has length / stride."""
    kernel, dilation = draw(st.integers(1, 5)), draw(st.integers(1, 2))
    stride = draw(st.integers(1, 3))
    reach = dilation * (kernel - 1) + 1
    least, most = max(0, -(-(reach - stride) // 2)), (reach - 1) // 2
    if least > most:  # an even reach with a stride of one is never in step
        return kernel + 1, stride, 1, kernel // 2 if kernel % 2 == 0 else (kernel + 1) // 2
    return kernel, stride, dilation, draw(st.integers(least, most))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_convolution_on_shards_is_that_of_the_whole(ranks, world_size):
    @settings(deadline=None, max_examples=10, database=None)
    @given(st.lists(cases(), min_size=8, max_size=8))
    def on_ranks(some: list[Case]) -> None:
        check(ranks, some, world_size)

    on_ranks()


def same(kernel: int, dilation: int = 1) -> Case:
    return Case((kernel,) * 2, (1, 1), (dilation,) * 2, "same")


def by_caller(kernel: int, stride: int, around: tuple[int, int], **more: Any) -> Case:
    return Case((kernel,) * 2, (stride,) * 2, (1, 1), (0, 0), caller=(around, around), **more)


NAMED = {
    "same": same(3),
    "same, dilated": same(5, 2),
    "same, dilated over time": Case((3,) * 3, (1,) * 3, (2, 1, 1), "same"),
    "caller pads evenly": by_caller(3, 1, (1, 1)),
    "caller pads evenly, widely": by_caller(5, 1, (2, 2), dim=WIDTH),
    "caller pads evenly before a stride": by_caller(3, 2, (1, 1)),
    "caller pads the end before a stride": by_caller(3, 2, (0, 1)),
    "caller pads the end, across": by_caller(3, 2, (0, 1), dim=WIDTH),
    "caller pads an even kernel": by_caller(4, 2, (1, 1)),
    "caller pads the end for an even kernel": by_caller(2, 1, (0, 1)),
    "caller pads more after than before": by_caller(4, 1, (1, 2)),
    "caller pads frames and all": Case(
        (3, 3, 3), (1, 1, 1), (1, 1, 1), (0, 0, 0), caller=((1, 1), (1, 1))
    ),
    "module pads one side, caller the other": Case(
        (3, 3), (1, 1), (1, 1), (1, 0), caller=((0, 0), (1, 1)), dim=WIDTH
    ),
    "patches": Case((2, 2), (2, 2), (1, 1), (0, 0)),
    "a kernel shorter than its stride": Case((1, 1), (2, 2), (1, 1), (0, 0)),
    "depthwise": Case((3, 3), (1, 1), (1, 1), (1, 1), groups=4),
    "frames alone": Case((3, 1, 1), (1, 1, 1), (1, 1, 1), (1, 0, 0)),
}


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ways_in_which_models_pad(ranks, world_size):
    check(ranks, list(NAMED.values()), world_size)


def test_a_shard_of_the_least_rows_is_enough(ranks):
    """For the kernels of its neighbours, whoever pads; of fewer rows some ranks have none."""
    every = [replace(case, rows=rows) for case in NAMED.values() for rows in (3, 4, 5)]
    mirrored = Case((3, 3), (1, 1), (1, 1), (1, 1), "reflect")
    every += [replace(mirrored, rows=rows) for rows in (2, 3, 4, 7)]
    check(ranks, every, 4)


def test_the_inputs_tell_a_halo_from_its_absence():
    """On shards without the rows of the neighbours each case would differ."""
    local = {"patches", "a kernel shorter than its stride", "frames alone"}
    for name, case in NAMED.items():
        module, x = case.module(), case.input()
        rows = partition(case.rows, 2, case.dim)
        factor = x.shape[case.dim] // case.rows
        whole = module(case.padded(x))
        off = 0.0
        for rank in (0, 1):
            alone = module(case.padded(part_of(x, rows, rank, factor)))
            off = max(off, error(alone, part_of(whole, rows, rank, 1)))
        assert (off > 1e-3) == (name not in local), name
