"""Ranks that are asked for one image make one image, or say what they were asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_denoisers import WIDTH, Pipeline, Toy, close, divide, prompts_of, state_of
from toy_results import seeded, text_of

from omni_parallel_state.denoising.requests import agree


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def arguments(kind: str, seed: int) -> dict[str, Any]:
    """Of one seed; torch's own generator is seeded as well."""
    torch.manual_seed(100 + seed)
    return {
        "none": {},
        "generator": {"generator": generator(seed)},
        "list": {"generator": [generator(seed), generator(seed + 1)]},
        "latents": {"latents": seeded(1, 6, WIDTH, seed=seed)},
        "latents and generator": {
            "latents": seeded(1, 6, WIDTH, seed=seed),
            "generator": generator(seed),
        },
    }[kind]


KINDS = ["none", "generator", "list", "latents", "latents and generator"]


def make(kind: str, seeds: str) -> tuple[Any, list[Any], list[Any]]:
    """Images of other seeds on each rank, with a scheduler that draws noise; then of one seed."""
    pipeline = Pipeline(Toy(), noise=0.1)
    state = state_of(2)
    me = state.cfg.rank_in_group
    prompts = prompts_of(2)
    expected = pipeline(prompts, **arguments(kind, 0)).sample
    later = [generator(0).get_state(), torch.get_rng_state()]
    found: list[Any] = []
    with divide(pipeline, 2, seeds=seeds):
        for seed in (10 * me, 10 * me, 0):
            given = arguments(kind, seed)
            before = {name: str(value) for name, value in given.items()}
            try:
                found.append(pipeline(prompts, **given).sample)
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")
            assert {name: str(value) for name, value in given.items()} == before
    return expected, found, later


@pytest.mark.parametrize("kind", KINDS)
def test_by_default_ranks_with_other_seeds_make_the_image_of_the_first(
    ranks: Any, kind: str
) -> None:
    for expected, found, _ in ranks.run(make, kind, "broadcast", timeout=30):
        for image in found:
            close(image, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_or_it_is_an_error_on_all_after_which_all_can_go_on(ranks: Any, kind: str) -> None:
    results = ranks.run(make, kind, "error", timeout=30)
    assert results[0][1][:2] == results[1][1][:2]
    for expected, found, _ in results:
        for text in found[:2]:
            if "latents" in kind:
                assert text.startswith(
                    "RankMismatchError: the ranks of one image were given different arguments "
                    "'latents':\n  group rank 0: float32 tensor (1, 6, 8) #"
                )
            else:
                assert text.startswith(
                    "RankMismatchError: group ranks [1] have another random state than group rank 0"
                )
        close(found[2], expected)


# -- other arguments ---------------------------------------------------------------------------


class Picture:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def tobytes(self) -> bytes:
        return self.data


def differing(name: str, me: int) -> dict[str, Any]:
    values: dict[str, Any] = {
        "scale": 3.0 + me,
        "prompt": ["a cat", "a dog"][me],
        "steps": 3 + me,
        "prompts": prompts_of(2 + me),
        "embeds": seeded(2, seed=me),
        "nested": {"a": [1, (2, seeded(3, seed=me))]},
        "picture": Picture(b"ab" if me else b"cd"),
        "flag": bool(me),
        "kind": [None, 1][me],
        "shape": seeded(2 + me),
    }
    return {"fixed": 1, "same": seeded(3), name: values[name]}


NAMES = ["scale", "prompt", "steps", "prompts", "embeds", "nested", "picture", "flag", "kind"]


def refused() -> list[str]:
    group = state_of(2).cfg
    me = group.rank_in_group
    found = []
    for seeds in ("broadcast", "error"):
        for name in (*NAMES, "shape"):
            given = differing(name, me) | {"latents": seeded(2)}
            found.append(text_of(lambda given=given, seeds=seeds: agree(group, (), given, seeds)))
        more = {"only": 1} if me else {}
        found.append(text_of(lambda more=more, seeds=seeds: agree(group, (), more, seeds)))
        found.append(text_of(lambda seeds=seeds: agree(group, ("a", 1 + me), {}, seeds)))
        assert agree(group, ("a", 1), {"same": seeded(3)}, seeds).keys() == {"same"}
    return found


def test_arguments_that_differ_are_an_error_that_names_them_on_all(ranks: Any) -> None:
    first, second = ranks.run(refused, timeout=30)
    assert first == second
    for texts in (first[:12], first[12:]):
        for name, text in zip([*NAMES, "shape", "only", "1"], texts, strict=True):
            start = "RankMismatchError: the ranks of one image were given different arguments"
            assert text.startswith(f"{start} '{name}':\n  group rank 0: ")
    assert first[0].endswith("  group rank 0: 3.0\n  group rank 1: 4.0")
    assert first[1].endswith("  group rank 0: 'a cat'\n  group rank 1: 'a dog'")
    assert first[10].endswith("  group rank 0: nothing\n  group rank 1: 1")


def other_latents(kind: str) -> list[Any]:
    """Of another shape or dtype, or none at all, on one of the ranks; then the same ones."""
    group = state_of(2).cfg
    me = group.rank_in_group
    values: dict[str, Any] = {
        "shape": seeded(2, 3 + me),
        "dtype": seeded(2, 3).to([torch.float32, torch.float64][me]),
        "none": None if me else seeded(2, 3),
        "none on the first": seeded(2, 3) if me else None,
        "list": [seeded(2)] if me else seeded(2),
    }
    given = {"latents": values[kind]}
    found: list[Any] = [text_of(lambda: agree(group, (), given, "broadcast"))]
    found.append(agree(group, (), {"latents": seeded(2, 3, seed=me)}, "broadcast")["latents"])
    return found


@pytest.mark.parametrize("kind", ["shape", "dtype", "none", "none on the first", "list"])
def test_latents_that_cannot_be_shared_are_an_error_on_all(ranks: Any, kind: str) -> None:
    first, second = ranks.run(other_latents, kind, timeout=20)
    assert first[0] == second[0]
    assert first[0].startswith("RankMismatchError: the ranks of one image were given different arg")
    for found in (first[1], second[1]):
        close(found, seeded(2, 3))


def kept_arguments() -> None:
    group = state_of(2).cfg
    mine = seeded(2, 3, seed=group.rank_in_group)
    before = mine.clone()
    given = {"latents": mine, "generator": generator(group.rank_in_group)}
    found = agree(group, (), given, "broadcast")
    assert torch.equal(mine, before), "the callers' own latents changed"
    assert given["latents"] is mine
    assert torch.equal(found["latents"], seeded(2, 3))
    assert found["generator"] is given["generator"]
    assert torch.equal(given["generator"].get_state(), generator(0).get_state())
    assert agree(group, (), {"latents": None}, "broadcast") == {"latents": None}
    with torch.inference_mode():
        found = agree(group, (), {"latents": mine.clone()}, "broadcast")
    assert torch.equal(found["latents"], seeded(2, 3))


def test_the_callers_latents_stay_as_they_are(ranks: Any) -> None:
    ranks.run(kept_arguments)


def of_one_rank() -> list[str]:
    """Inputs of the denoiser that differ although the arguments do not."""
    me = state_of(2).cfg.rank_in_group

    class Hidden(Pipeline):
        def combined(self, latents: Any, *rest: Any) -> Any:
            return super().combined(latents * (1 + me), *rest)

    found = []
    pipeline = Hidden(Toy())
    with divide(pipeline, 2):
        for prompts in (prompts_of(2), prompts_of(2)):
            found.append(text_of(lambda p=prompts: pipeline(p, latents=seeded(1, 6, WIDTH))))
    return found


def test_latents_that_come_apart_on_the_way_are_found_in_the_first_step(ranks: Any) -> None:
    for found in ranks.run(of_one_rank, timeout=30):
        for text in found:
            assert text == (
                "RankMismatchError: guidance branch 0 (transformer) has other inputs on group rank "
                "1 than on group rank 0; the ranks of one image need the same latents and prompts: "
                "seed them alike"
            )
