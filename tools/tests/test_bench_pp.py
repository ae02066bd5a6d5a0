"""The benchmark of stages knows what each schedule can gain, counts right, and runs on ranks."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from bench import pp, pp_case
from bench.harness import Harness
from bench.pp_arithmetic import bytes_of_step, ideal, ideal_of_patches, ideal_of_requests
from bench.pp_case import StagedCase
from bench.pp_contestants import ALONE, EXACT_STEPS, OWN, Entrant, stage_contestants
from bench.pp_report import staged_parts
from bench.pp_results import StagedMeasured, StagedResult
from bench.pp_work import BATCH, GUIDED, UNGUIDED, arguments, build_work
from bench.report import WIDTH, show
from bench.results import CaseResult, Report

# diffusers' own: numpy 2 in its schedulers, and names that it has given new ones.
of_diffusers = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
FAMILIES = ("flux", "wan", "qwen")
STEPS = 6


def simulated(stages: int, micro_batches: int, virtual: int) -> float:
    """Speed-up of a step by working it off: each rank runs what is there, level by level."""
    free, ready = [0] * stages, [0] * micro_batches
    for _ in range(virtual):
        for stage in range(stages):
            for one in range(micro_batches):
                ready[one] = free[stage] = max(free[stage], ready[one]) + 1
    return micro_batches * stages * virtual / max(ready)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_ideals_are_those_of_a_simulated_pipeline(stages: int):
    for micro_batches, virtual in itertools.product(range(1, 9), range(1, 5)):
        found = ideal(stages, micro_batches, virtual)
        assert found == pytest.approx(simulated(stages, micro_batches, virtual))
        assert found <= min(stages, micro_batches)


def test_ideals_are_those_of_the_design():
    assert ideal(2, 1) == ideal(4, 1, 3) == 1
    assert ideal(2, 2) == pytest.approx(4 / 3)
    assert ideal(2, 2, 2) == 1.6
    assert ideal(2, 2, 4) == pytest.approx(16 / 9)
    assert ideal(2, 4) == 1.6
    for stages, requests, branches in itertools.product((2, 3, 4), (2, 3, 4, 5), (1, 2, 3)):
        full = (requests - 1) * branches >= stages - 1
        found = ideal_of_requests(stages, requests, branches)
        assert (found == pytest.approx(stages)) == full, (stages, requests, branches)


def test_ideals_of_the_contestants():
    found = {c.mode: round(c.ideal, 2) for c in stage_contestants() if c.side == OWN}
    assert found == {
        "plain": 1.0,
        "branches": 1.33,
        "virtual-2": 1.6,
        "virtual-4": 1.78,
        "batch-4": 1.6,
        "requests-2": 2.0,
        "requests-3": 2.0,
        "patches-2": 2.0,
        "patches-3": 2.0,
        "patches-4": 2.0,
        "patches-8": 2.0,
    }
    assert {c.ideal for c in stage_contestants() if c.side == ALONE} == {1.0}


def test_every_chunk_sends_its_flow_and_the_last_stage_the_results():
    assert bytes_of_step(2, 1, 2, flow=320, result=224) == (2 * 321, 2 * 225)
    assert bytes_of_step(2, 2, 2, flow=320, result=224) == (4 * 321, 2 * (321 + 225))
    assert bytes_of_step(3, 1, 1, flow=320, result=224) == (321, 321, 2 * 225)


@of_diffusers
@pytest.mark.parametrize("family", FAMILIES)
def test_works_are_what_they_are_called(family: str):
    stock = build_work(family, 40, 3)
    calls: list[int] = []
    stock.pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))

    def make(work: Any, request: int = 0) -> torch.Tensor:
        calls.clear()
        given = arguments(work.of(stock, request), 2)
        assert not calls
        found: torch.Tensor = stock.pipeline(**given)[0]
        assert len(calls) == 2 * work.branches
        return found

    guided, unguided, batch = make(GUIDED), make(UNGUIDED), make(BATCH)
    assert batch.shape == (4, *guided.shape[1:])
    assert not torch.allclose(guided, unguided, atol=1e-3)
    assert not torch.allclose(guided, make(GUIDED, 1), atol=1e-3)
    assert torch.equal(guided, make(GUIDED))
    assert stock.prediction_bytes == guided.nbytes
    assert len({float(one.sum()) for one in batch}) == 4


@of_diffusers
def test_weights_are_those_of_all_modules_shown_or_not():
    stock = build_work("wan", 40, 3)
    whole = sum(p.nbytes for p in stock.pipeline.transformer.parameters())
    entrant = Entrant(stage_contestants()[0], stock, (1.0,) * 3)
    assert entrant.weights() == (whole, whole)
    hidden = stock.pipeline.transformer.blocks.pop(2)
    assert entrant.weights() == (whole, whole)
    hidden.to("meta")
    gone = sum(p.nbytes for p in hidden.parameters())
    assert entrant.weights()[0] == whole - gone


def result_of(case: StagedCase, **seconds: float) -> StagedResult:
    """Made up; every contestant reaches its ideal, and one process takes 100 seconds."""
    measured = tuple(
        StagedMeasured(
            c.name,
            c.side,
            (seconds.get(c.mode.replace("-", "_"), 100.0 / c.ideal_of(STEPS)),) * 3,
            1.2e-7,
            mode=c.mode,
            work=c.work.name,
            ideal=c.ideal_of(STEPS),
            patches=c.patches,
            exact_share=EXACT_STEPS / STEPS,
            held=(1_234_000_000,) * 2,
            promised=(1_234_000_000,) * 2,
            sent=() if c.alone else (123_456_789, 2),
            expected=() if c.alone else (123_456_789.0, 2.0),
        )
        for c in stage_contestants()
    )
    return StagedResult(
        case.title, 2, "omni-sp", (100.0,) * 3, (100.0,) * 3, measured, timed="image"
    )


def changed(case: StagedResult, mode: str, **values: Any) -> StagedResult:
    members = [
        replace(m, **values) if (m.side, m.mode) == (OWN, mode) else m for m in case.staged()
    ]
    return replace(case, measured=tuple(members))


def test_exact_steps_count_as_such():
    fused = {c.patches: c for c in stage_contestants() if c.patches}
    assert list(fused) == [2, 3, 4, 8]
    assert fused[4].ideal_of(1) == 1
    assert fused[4].ideal_of(6) == pytest.approx(6 / (1 + 5 / 2))
    assert ideal_of_patches(3, 10, 2, 1.5) == pytest.approx(10 / (2 / 1.5 + 8 / 3))


def test_steps_in_patches_are_compared_without_the_exact_ones():
    case = result_of(pp_case.CASES["flux-320"])
    by_mode = {m.mode: m for m in case.staged() if m.patches}
    found = case.steady(by_mode["patches-4"])
    assert found is not None
    assert found.median == pytest.approx(2)
    # One exact step of a sixth of 100 seconds, and five of a fifth of 60 more.
    slow = replace(by_mode["patches-4"], seconds=(100 / 6 + 60,) * 3)
    found = case.steady(slow)
    assert found is not None
    assert found.median == pytest.approx((500 / 6) / 60)
    assert case.steady(next(m for m in case.own() if not m.patches)) is None


def bars(case: StagedResult) -> list[bool]:
    return [bar.met for bar in case.bars()]


def test_bars_are_met_or_not():
    case = result_of(pp_case.CASES["wan-320"])
    assert bars(case) == [True] * 6
    assert bars(result_of(pp_case.CASES["wan-320"], branches=89.0)) == [False, *[True] * 5]
    assert bars(result_of(pp_case.CASES["wan-320"], branches=88.0)) == [True] * 6
    slow = result_of(pp_case.CASES["wan-320"], requests_2=100 / 1.69)
    assert bars(slow) == [False, False, True, True, True, True]
    modes = ("patches_2", "patches_3", "patches_4", "patches_8")
    all_slow = result_of(pp_case.CASES["wan-320"], **dict.fromkeys(modes, 70.0))
    assert bars(all_slow) == [True, True, False, True, True, True]
    assert bars(result_of(pp_case.CASES["wan-320"], **dict.fromkeys(modes[1:], 70.0))) == [True] * 6
    assert "requests-2" in slow.bars()[0].what
    heavy = changed(case, "plain", held=(1_300_000_000, 1_234_000_000))
    assert bars(heavy) == [True, True, True, False, True, True]
    light = changed(case, "plain", held=(1_234_000_000, 1_100_000_000))
    assert bars(light) == [True, True, True, False, True, True]
    assert bars(changed(case, "batch-4", sent=(123_456_788, 2)))[4] is False
    assert bars(changed(case, "batch-4", sent=(123_456_789, 3)))[4] is False
    assert bars(changed(case, "virtual-2", error=1.1e-5)) == [*[True] * 5, False]
    assert bars(changed(case, "patches-2", error=1e-2)) == [True] * 6
    assert bars(replace(case, measured=())) == []


def test_each_is_compared_with_one_process_that_makes_the_same():
    case = result_of(pp_case.CASES["flux-320"], unguided=50.0)
    by_name = {m.name: m for m in case.staged()}
    slow = {f"{ALONE} unguided": 50.0, f"{OWN} plain": 100.0}
    measured = tuple(replace(by_name[name], seconds=(s,) * 3) for name, s in slow.items())
    case = replace(case, measured=measured)
    speed_up = case.speed_up(measured[1])
    assert speed_up is not None
    assert speed_up.median == 0.5
    assert case.share(measured[1]) == 0.5
    assert replace(case, measured=measured[1:]).speed_up(measured[1]) is None


def test_the_report_fits_a_hundred_columns_and_says_each_bar():
    cases = [result_of(case) for case in pp_case.CASES.values()]
    cases.append(changed(cases[0], "batch-4", sent=(123_456_788, 2), held=(1, 2)))
    console = Console(width=WIDTH)
    with console.capture() as capture:
        show(Report("stages", list[CaseResult](cases)), console, staged_parts)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "…" not in capture.get()
    text = " ".join(" ".join(lines).split())
    for name in (c.name for c in stage_contestants()):
        assert text.count(f"│ {name} ") == len(cases)
    for part in ("1234 =", "0 ≠", "123.46 =", "123.46 ≠", "1.33 │ 100% │", "all do"):
        assert part in text
    assert "123,456,788, 2 bytes per step by rank; arithmetic gives 123,456,789, 2" in text
    assert text.count("NOT MET") == 2


def test_rows_divide_into_all_chunks_and_are_named_by_themselves():
    known = {**pp_case.CASES, **pp_case.OTHER_CASES}
    most = max(c.virtual for c in stage_contestants()) * 2
    for name, case in known.items():
        assert case.name == name
        assert case.layers % most == 0
    assert {case.family for case in pp_case.CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "wan-1"], "'wan-1' is unknown; legal: flux-320, wan-320, qwen-320, flux-1280"),
        (["--modes", "virtual-3"], "is called 'virtual-3'; legal: "),
        (["--rounds", "0"], "0 is not in the range"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(arguments: list[str], message: str):
    result = CliRunner().invoke(pp.main, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_the_list_names_every_row():
    result = CliRunner().invoke(pp.main, ["--list"])
    assert result.exit_code == 0
    found = [line.split()[0] for line in result.output.splitlines()]
    assert found == [*pp_case.CASES, *pp_case.OTHER_CASES]


def test_one_process_takes_part_in_what_is_asked_for():
    given = {"rows": (), "modes": ("plain", "requests-2"), "rounds": None, "json_path": None}
    team = pp.parse({**given, "quick": True}).contestants
    assert [c.name for c in team] == [f"{ALONE} unguided", f"{OWN} plain", f"{OWN} requests-2"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_contestant_makes_the_images_of_one_process(family: str):
    case, team = StagedCase(family, 40, 9, 2), stage_contestants()
    with Harness(lambda _: None) as harness:
        result = harness.run(pp_case.race_case, 2, case, team, 1)
    assert [m.name for m in result.measured] == [c.name for c in team]
    for measured in result.staged():
        assert measured.problem is None, measured.name
        assert measured.error is not None
        assert measured.patches or measured.error <= 1e-5, measured.name
        assert len(measured.seconds) == 1
        assert measured.bytes_fit, measured.name
        assert measured.held == measured.promised
    whole, cut = (next(m for m in result.staged() if m.side == side) for side in (ALONE, OWN))
    assert max(cut.held) < 0.75 * max(whole.held)
    assert result.ratios(cut)["share_of_ideal"] is not None


@pytest.mark.slow
def test_the_command_writes_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny = StagedCase("wan", 40, 2, 2)
    monkeypatch.setattr(pp, "QUICK_CASES", {tiny.name: tiny})
    path = tmp_path / "report.json"
    options = ["--quick", "--rounds", "1", "--modes", "plain", "--json", str(path)]
    result = CliRunner().invoke(pp.main, options)
    assert result.exit_code == 0, result.output
    (case,) = json.loads(path.read_text())["cases"]
    alone, plain = case["measured"]
    assert (alone["mode"], plain["mode"]) == ("unguided", "plain")
    assert plain["sent"] == plain["expected"]
    assert plain["share_of_ideal"]["median"] == plain["speed_up"]["median"] > 0
