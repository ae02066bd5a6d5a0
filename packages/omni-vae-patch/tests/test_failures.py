"""An error on one rank is raised on every rank, nobody waits for ever, the next call is right."""

from __future__ import annotations

import copy
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
    peers = "PeerOutOfMemoryError" if kind == "OutOfMemoryError" else "ParallelError"
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
        assert text.split(": ")[0].endswith("OutOfMemoryError")
        assert text.endswith("no more")
        assert max(again, removed) <= 1e-5


@torch.no_grad()
def fail_again_and_again(name: str, before: bool) -> list[Any]:
    """After a call that went well; the rank cannot go through it without computing either."""
    vae, group, z = SmallVae(nn.GroupNorm(2, 8)), everyone(), random(1, 4, 7, 5)
    alone = vae.decode(z)

    def fail(*_: Any) -> None:
        msg = "no more"
        raise RuntimeError(msg)

    with parallelize_vae(vae, EXACT, group=group):
        found: list[Any] = [error(vae.decode(z), alone)]
        module = vae.get_submodule(name)
        if group.rank_in_group == 1:
            hook = (
                module.register_forward_pre_hook(fail)
                if before
                else module.register_forward_hook(fail)
            )
        found.append(text_of(lambda: vae.decode(z)))
        if group.rank_in_group == 1:
            hook.remove()
        return [*found, error(vae.decode(z), alone)]


@pytest.mark.parametrize(("name", "before"), [("decoder.0", True), ("decoder.3", False)])
@pytest.mark.parametrize("world_size", [2, 3])
def test_an_error_that_comes_again_is_raised_on_all_where_a_call_went_well(
    ranks, world_size, name, before
):
    results = ranks.run(fail_again_and_again, name, before, world_size=world_size, timeout=30)
    for me, (first, text, last) in enumerate(results):
        own = "RuntimeError: no more"
        assert text == (
            own if me == 1 else f"ParallelError: the autoencoder failed on rank 1: {own}"
        )
        assert max(first, last) <= 1e-5


def first_call_fails() -> tuple[str, list[str]]:
    """On every rank alike, as broken code does."""
    vae, group = SmallVae(), everyone()

    def fail(*_: Any) -> None:
        msg = "no more"
        raise RuntimeError(msg)

    with parallelize_vae(vae, EXACT, group=group):
        vae.decoder[3].register_forward_hook(fail)
        try:
            vae.decode(random(1, 4, 7, 5))
        except RuntimeError as raised:
            return str(raised), getattr(raised, "__notes__", [])
    return "none", []


def test_an_error_of_all_ranks_in_the_first_call_is_one_error_and_no_log(ranks):
    for outcome in ranks.outcomes(first_call_fails, timeout=30):
        text, notes = outcome.value
        assert text == "no more"
        assert len(notes) == 1
        assert "could not go through the call without computing" in notes[0]
        assert outcome.stderr == ""


@torch.no_grad()
def of_another_dtype() -> str:
    """Which the first convolution refuses, on every rank."""
    vae = SmallVae()
    with parallelize_vae(vae, EXACT, group=everyone()):
        vae.decoder.half()
        return text_of(lambda: vae.decode(random(1, 4, 7, 5)))


def test_an_input_that_a_module_refuses_is_one_error_and_no_log(ranks):
    for outcome in ranks.outcomes(of_another_dtype, timeout=30):
        assert outcome.value.startswith("RuntimeError")
        assert outcome.stderr == ""


@torch.no_grad()
def compiled(backend: str) -> list[Any]:
    """Within the code that was compiled, once; a count of calls tells that it was compiled."""
    flags = {"fail": False}

    @torch.library.custom_op("omni_vae_patch_tests::fail", mutates_args=())
    def maybe_fail(x: torch.Tensor) -> torch.Tensor:
        if flags["fail"]:
            flags["fail"] = False
            msg = "no more"
            raise torch.OutOfMemoryError(msg)
        return x.clone()

    maybe_fail.register_fake(torch.empty_like)

    class Op(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return maybe_fail(x)

    group, z = everyone(), random(1, 4, 7, 5)
    vae = SmallVae(nn.Sequential(Op(), nn.GroupNorm(2, 8), nn.MaxPool2d(3, 1, 1)))
    vae_of = copy.deepcopy(vae).decode
    alone, found = vae.decode(z), []
    with parallelize_vae(vae, EXACT, group=group):
        vae.decoder.compile(backend=backend, fullgraph=True)
        found.append(error(vae.decode(z), alone))
        flags["fail"] = group.rank_in_group == 1
        found.append(text_of(lambda: vae.decode(z)))
        found.append(error(vae.decode(z), alone))
        larger = [random(1, 4, side, 6) for side in (9, 10, 12)]
        found += [error(vae.decode(one), vae_of(one)) for one in larger]
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_failure_in_a_compiled_decoder_is_raised_on_all(ranks, world_size, backend):
    for first, text, *last in ranks.run(compiled, backend, world_size=world_size, timeout=90):
        assert text.split(": ")[0].endswith("OutOfMemoryError")
        assert text.endswith("no more")
        assert max(first, *last) <= 1e-5  # of other sizes, too
