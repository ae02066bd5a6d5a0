"""An error on one rank is raised on every rank, nobody waits for ever, the next call is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_vaes import SmallVae, error, everyone, random, text_of
from stock_autoencoders import CASES, decoded
from torch import nn

from omni_vae_patch import VaeParallelConfig, parallelize_vae

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:In CPU autocast:UserWarning"
)

EXACT = VaeParallelConfig("exact", verify=False)


def fail_once(module: nn.Module, raised: Exception, *, before: bool) -> None:
    """Have the next call of a module raise, before or after it did its work."""

    def fail(*_: Any) -> None:
        handle.remove()
        raise raised

    handle = (
        module.register_forward_pre_hook(fail) if before else module.register_forward_hook(fail)
    )


PLACES = {
    "the first module": ("decoder.0", True),
    "after the first module": ("decoder.0", False),
    "a norm": ("decoder.1", True),
    "the middle": ("decoder.3", False),
    "the last module": ("decoder.5", True),
    "after the last module": ("decoder.5", False),
}
ERRORS = {"RuntimeError": RuntimeError, "OutOfMemoryError": torch.OutOfMemoryError}


@torch.no_grad()
def fail_at(places: list[tuple[str, bool]], kind: str, failing: list[int]) -> list[Any]:
    """What each failing call raises on this rank, and the error of the decode that follows it."""
    vae, group, z = SmallVae(), everyone(), random(1, 4, 7, 5)
    alone = vae.decode(z)
    found: list[Any] = []
    with parallelize_vae(vae, EXACT, group=group):
        for name, before in places:
            if group.rank_in_group in failing:
                fail_once(vae.get_submodule(name), ERRORS[kind]("no more"), before=before)
            found.append((text_of(lambda: vae.decode(z)), error(vae.decode(z), alone)))
    return found


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_raises_wherever_one_fails(ranks, world_size, kind):
    """The failing rank its own error; the others one that names it, out of memory as it was."""
    results = ranks.run(
        fail_at, list(PLACES.values()), kind, [1], world_size=world_size, timeout=30
    )
    peers = "OutOfMemoryError" if kind == "OutOfMemoryError" else "ParallelError"
    for me, found in enumerate(results):
        own = f"{kind}: no more"
        other = f"{peers}: the autoencoder failed on rank 1: {own}"
        for place, (text, off) in zip(PLACES, found, strict=True):
            assert text == (own if me == 1 else other), place
            assert off <= 1e-5, place


def test_when_all_fail_each_raises_its_own(ranks):
    for found in ranks.run(fail_at, [("decoder.3", True)], "RuntimeError", [0, 1], timeout=30):
        assert found[0][0] == "RuntimeError: no more"
        assert found[0][1] <= 1e-5


def test_of_two_that_fail_the_first_is_named_to_the_others(ranks):
    places = [("decoder.1", True)]
    results = ranks.run(fail_at, places, "RuntimeError", [0, 2], world_size=3, timeout=30)
    assert [found[0][0] for found in results] == [
        "RuntimeError: no more",
        "ParallelError: the autoencoder failed on rank 0: RuntimeError: no more",
        "RuntimeError: no more",
    ]


@torch.no_grad()
def fail_without_rows(idle: int) -> list[Any]:
    """A rank without rows fails; so does one with rows, while others have none."""
    vae, group, z = SmallVae(), everyone(), random(1, 4, 2, 2)
    alone, found = vae.decode(z), []
    with parallelize_vae(vae, EXACT, group=group):
        for rank in (idle, 0):
            if group.rank_in_group == rank:
                fail_once(vae.decoder[3], RuntimeError("no more"), before=True)
            found.append((text_of(lambda: vae.decode(z)), error(vae.decode(z), alone)))
    return found


def test_ranks_without_rows_raise_and_fail_as_others_do(ranks):
    results = ranks.run(fail_without_rows, 2, world_size=3, timeout=30)
    for me, found in enumerate(results):
        for failing, (text, off) in zip((2, 0), found, strict=True):
            own = "RuntimeError: no more"
            other = f"ParallelError: the autoencoder failed on rank {failing}: {own}"
            assert text == (own if me == failing else other)
            assert off <= 1e-5


@torch.no_grad()
def fail_encoding() -> list[Any]:
    vae, group, x = SmallVae(), everyone(), random(1, 3, 14, 10)
    alone = vae.encode(x)
    with parallelize_vae(vae, EXACT, group=group):
        if group.rank_in_group == 1:
            fail_once(vae.encoder[1], ValueError("no more"), before=True)
        return [text_of(lambda: vae.encode(x)), error(vae.encode(x), alone)]


def test_encoding_fails_on_all_ranks_too(ranks):
    other = "ParallelError: the autoencoder failed on rank 1: ValueError: no more"
    results = ranks.run(fail_encoding, timeout=30)
    assert [text for text, _ in results] == [other, "ValueError: no more"]
    assert all(off <= 1e-5 for _, off in results)


STATEFUL = ["kl", "wan-2.1", "cogvideox", "magvit", "hunyuan-video", "ltx2-video"]


@torch.no_grad()
def fail_in(name: str) -> tuple[str, float, float]:
    """In a stock decoder's middle; those of videos keep features of the frames before."""
    case = CASES[name]
    vae, z, group = case.build(), case.latent(4, 5, 0), everyone()
    alone = decoded(vae, z)
    names = [path for path, _ in vae.decoder.named_modules()]
    middle = vae.decoder.get_submodule(names[len(names) // 2])
    handle = parallelize_vae(vae, EXACT, group=group)
    if group.rank_in_group == 1:
        fail_once(middle, torch.OutOfMemoryError("no more"), before=False)
    text = text_of(lambda: decoded(vae, z))
    again = error(decoded(vae, z), alone)
    handle.remove()
    return text, again, error(decoded(vae, z), alone)


@pytest.mark.parametrize("name", STATEFUL)
def test_stock_autoencoders_go_on_after_a_failure(ranks, name):
    for text, again, removed in ranks.run(fail_in, name, timeout=60):
        assert text.startswith("OutOfMemoryError: ")
        assert text.endswith("no more")
        assert max(again, removed) <= 1e-5
