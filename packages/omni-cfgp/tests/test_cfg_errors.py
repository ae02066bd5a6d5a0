"""An error of one branch of `CFGParallelMixin` is one of every rank, and nobody waits for ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_denoisers import WIDTH, Failing, Toy, failing, prompts_of, state_of
from toy_results import seeded, text_of

from omni_cfgp import CFGParallelMixin
from omni_group_coordinator import ParallelConfigError, ParallelError, RankMismatchError

LATENTS = seeded(1, 6, WIDTH, seed=5)


class Mixed(CFGParallelMixin):
    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer


def fail_in(steps: list[list[int]], count: int, world: int) -> list[str]:
    """Steps in which some branches fail; the last one is right."""
    pipeline = Mixed(Failing())
    prompts = prompts_of(count)
    scales = {str(i): 2.0 for i in range(count - 1)}
    found = []
    with state_of(world).use():
        for bad in (*steps, []):
            inputs = [
                {"hidden_states": LATENTS, "encoder_hidden_states": failing(p) if i in bad else p}
                for i, p in enumerate(prompts)
            ]
            call = pipeline.predict_noise_with_multi_branch_cfg
            found.append(text_of(lambda inputs=inputs, call=call: call(True, scales, inputs)))
    return found


@pytest.mark.parametrize(
    ("world", "count", "branch", "rank"), [(2, 2, 0, 0), (2, 2, 1, 1), (2, 3, 2, 0), (4, 3, 1, 1)]
)
def test_a_branch_that_raises_ends_the_step_on_all_ranks(
    ranks: Any, world: int, count: int, branch: int, rank: int
) -> None:
    """In the first step and in later ones; after which the next step is right."""
    steps = [[branch], [], [branch], [branch], []]
    results = ranks.run(fail_in, steps, count, world, world_size=world, timeout=30)
    own = "ZeroDivisionError: out of toys"
    others = f"ParallelError: guidance branch {branch} failed on rank {rank}: {own}"
    for me, found in enumerate(results):
        error = own if me == rank else others
        assert found == [error, "none", error, error, "none", "none"]


def test_when_all_branches_raise_each_rank_raises_its_own(ranks: Any) -> None:
    steps = [[0, 1], [], [0, 1], []]
    for found in ranks.run(fail_in, steps, 2, 2, timeout=30):
        error = "ZeroDivisionError: out of toys"
        assert found == [error, "none", error, "none", "none"]


class Odd(Toy):
    """What it predicts depends on its prompt: another shape, or another dtype."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, hidden_states: Any, encoder_hidden_states: Any = None) -> Any:
        (found,) = super().forward(hidden_states, encoder_hidden_states)
        if encoder_hidden_states.shape[1] == 5:
            return {
                "shape": (found[:, :3],),
                "dtype": (found.half(),),
                "tuple": ((found, found),),
                "nothing": (None,),
            }[self.kind]
        return (found,)


def odd(kind: str, world: int) -> list[str]:
    pipeline = Mixed(Odd(kind))
    call = pipeline.predict_noise_maybe_with_cfg
    inputs = [
        {"hidden_states": LATENTS, "encoder_hidden_states": prompt}
        for prompt in prompts_of(3, (4, 5, 6))
    ]
    with state_of(world).use():
        pairs = [inputs[:2], inputs[1::-1], inputs[::2]]
        return [text_of(lambda pair=pair: call(True, 4.0, *pair)) for pair in pairs]


ODD = {
    "shape": "the guidance branches predict different shapes or dtypes:\n"
    "  branch 0: float32 (1, 6, 8)\n  branch 1: float32 (1, 3, 8)",
    "dtype": "the guidance branches predict different shapes or dtypes:\n"
    "  branch 0: float32 (1, 6, 8)\n  branch 1: float16 (1, 6, 8)",
    "tuple": "the guidance branches predict different shapes or dtypes:\n"
    "  branch 0: float32 (1, 6, 8)\n  branch 1: float32 (1, 6, 8), float32 (1, 6, 8)",
}


@pytest.mark.parametrize("kind", ODD)
def test_branches_that_predict_different_shapes_are_an_error_on_all_ranks(
    ranks: Any, kind: str
) -> None:
    for world in (2, 3):
        for found in ranks.run(odd, kind, world, world_size=world, timeout=30):
            assert found[0] == f"ParallelError: {ODD[kind]}"
            assert found[1].startswith("ParallelError: the guidance branches predict different")
            assert found[2] == "none"


def gradients() -> list[str]:
    with state_of(2).use():
        toy = Toy()
        toy.weight.requires_grad_()
        pipeline = Mixed(toy)
        inputs = [{"hidden_states": LATENTS, "encoder_hidden_states": p} for p in prompts_of(2)]
        call = pipeline.predict_noise_maybe_with_cfg
        found = [text_of(lambda: call(True, 4.0, *inputs))]
        with torch.no_grad():
            found.append(text_of(lambda: call(True, 4.0, *inputs)))
    return found


def test_gradients_are_an_error_that_says_what_to_do(ranks: Any) -> None:
    for found in ranks.run(gradients, timeout=30):
        assert "guidance over ranks is for inference" in found[0]
        assert found[1] == "none"


def other_branches(rank_of: Any) -> list[str]:
    state = state_of(2)
    me = state.cfg.rank_in_group
    pipeline = Mixed(Toy())
    prompts = prompts_of(2, (4, 4 + me))
    inputs = [{"hidden_states": LATENTS, "encoder_hidden_states": p} for p in prompts]
    with state.use():
        call = pipeline.predict_noise_maybe_with_cfg
        return [text_of(lambda: call(True, 4.0, *inputs))]


def test_ranks_with_prompts_of_other_lengths_are_an_error_on_both(ranks: Any) -> None:
    first, second = ranks.run(other_branches, None, timeout=30)
    assert first == second
    name = RankMismatchError.__name__
    assert first[0].startswith(f"{name}: the ranks of one image have different inputs in the first")


def test_errors_are_of_one_family() -> None:
    assert issubclass(ParallelConfigError, ParallelError)
    assert issubclass(RankMismatchError, ParallelError)
