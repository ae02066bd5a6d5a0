"""The rows of the neighbours are under way while a rank convolves its own."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from small_vaes import SmallVae, error, everyone, random, text_of

from omni_group_coordinator import PendingWork
from omni_group_coordinator.checked_group import CheckedGroup
from omni_vae_patch import VaeParallelConfig, parallelize_vae
from omni_vae_patch.spatial.posted import can_post

EXACT = VaeParallelConfig("exact", "height", verify=False)
LATENT = random(1, 4, 12, 5)


@torch.no_grad()
def order() -> tuple[list[str], float]:
    """What the last convolution of a decoder does, in order."""
    vae, seen = SmallVae(), []
    alone = vae.decode(LATENT)
    last: Any = vae.decoder[5]
    convolve = last._conv_forward

    def noting(*args: Any) -> Any:
        seen.append("convolve")
        return convolve(*args)

    last._conv_forward = noting
    post, wait = CheckedGroup.iexchange, PendingWork.wait
    with parallelize_vae(vae, EXACT, group=everyone()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckedGroup, "iexchange", lambda *a: [seen.append("post"), post(*a)][1])
        patch.setattr(PendingWork, "wait", lambda work: [seen.append("wait"), wait(work)][1])
        last.register_forward_pre_hook(lambda *_: seen.clear())
        ends: list[str] = []
        last.register_forward_hook(lambda *_: ends.extend(seen))
        off = error(vae.decode(LATENT), alone)
    return ends, off


def test_rows_are_posted_before_the_convolution_and_awaited_after_it(ranks):
    results = ranks.run(order, world_size=3)
    for (seen, off), messages in zip(results, (2, 4, 2), strict=True):
        assert seen == ["post", "convolve", *["wait"] * messages]
        assert off <= 1e-5


@torch.no_grad()
def fail_between(name: str, raised: str, again: bool, first_call: bool) -> list[Any]:
    """One rank's convolution fails while rows are under way; once, or until it is repaired."""
    vae, group = SmallVae(), everyone()
    alone, failing = vae.decode(LATENT), {"left": 0}
    module: Any = vae.get_submodule(name)
    convolve = module._conv_forward

    def maybe(*args: Any) -> Any:
        if failing["left"]:
            failing["left"] -= 1
            msg = "no more"
            raise {"memory": torch.OutOfMemoryError, "other": ValueError}[raised](msg)
        return convolve(*args)

    module._conv_forward = maybe
    found: list[Any] = []
    with parallelize_vae(vae, EXACT, group=group):
        if not first_call:
            found.append(error(vae.decode(LATENT), alone))
        if group.rank_in_group == 1:
            failing["left"] = 1000 if again else 1
        with warnings.catch_warnings(record=True) as dropped:
            warnings.simplefilter("always")
            found.append(text_of(lambda: vae.decode(LATENT)))
            gc.collect()
        if any(issubclass(one.category, ResourceWarning) for one in dropped):
            found[-1] = "dropped without a wait"
        failing["left"] = 0
        return [*found, error(vae.decode(LATENT), alone), error(vae.decode(LATENT), alone)]


@pytest.mark.parametrize("name", ["decoder.0", "decoder.5"])
@pytest.mark.parametrize("raised", ["memory", "other"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_failure_while_rows_are_under_way_is_raised_on_all(ranks, world_size, name, raised):
    for text, *off in ranks.run(
        fail_between, name, raised, False, True, world_size=world_size, timeout=30
    ):
        assert text.endswith("no more")
        assert max(off) <= 1e-5


@pytest.mark.parametrize("world_size", [2, 3])
def test_one_that_comes_again_is_so_too_where_a_call_went_well(ranks, world_size):
    for first, text, *off in ranks.run(
        fail_between, "decoder.5", "other", True, False, world_size=world_size, timeout=30
    ):
        assert text.endswith("no more")
        assert max(first, *off) <= 1e-5


@pytest.mark.parametrize(
    ("lengths", "before", "after", "expected"),
    [
        ([3, 3], 1, 1, True),
        ([3, 2, 2], 2, 2, True),
        ([3, 1, 1, 0], 1, 1, True),
        ([3, 1], 2, 2, False),  # of more ranks than the next
        ([3, 3], 0, 1, False),
        ([3, 3], 1, 0, False),
    ],
)
def test_only_rows_of_the_next_rank_are_posted(lengths, before, after, expected):
    assert can_post(lengths, before, after) is expected
