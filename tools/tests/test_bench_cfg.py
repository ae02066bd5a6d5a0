"""The benchmark of guidance makes one picture in every way, counts right, and runs on ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from bench import cfg, cfg_case
from bench.cfg_contestants import guidance_contestants
from bench.pipelines import PIPELINES, GuidedPipeline, build_pipeline
from bench.report import WIDTH, show
from bench.results import CaseResult, Measured, Report, Traffic

# diffusers' own: numpy 2 in its schedulers, and names that it has given new ones.
of_diffusers = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
SIZES = {"demo": 64, "qwen": 40, "wan": 40}


def tiny(family: str) -> GuidedPipeline:
    return build_pipeline(family, SIZES[family], 2)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@of_diffusers
@pytest.mark.parametrize("family", PIPELINES)
def test_one_batch_of_both_branches_makes_the_picture_of_two_calls(family: str):
    stock = tiny(family)
    calls: list[int] = []
    stock.pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    expected = stock.sequential(3)
    assert len(calls) == 6
    assert error(stock.batched(3), expected) < 1e-5
    assert len(calls) == 9
    unguided = replace(stock, guide=lambda positive, negative, scale: positive)
    assert error(unguided.batched(3), expected) > 1e-2


@of_diffusers
@pytest.mark.parametrize("family", PIPELINES)
def test_a_twin_shares_weights_and_nothing_that_a_call_changes(family: str):
    stock = tiny(family)
    twin = stock.twin()
    twin.pipeline.transformer.register_forward_hook(lambda *_: pytest.fail("that was the twin's"))
    first, second = (
        next(one.pipeline.transformer.parameters()).data_ptr() for one in (stock, twin)
    )
    assert first == second
    assert stock.pipeline.scheduler is not twin.pipeline.scheduler
    assert torch.equal(stock.sequential(2), stock.twin().sequential(2))


@of_diffusers
def test_the_demo_s_title_says_how_many_tokens_there_are():
    for case in cfg_case.CASES.values():
        if case.family == "demo":
            guided = build_pipeline("demo", case.size, case.layers)
            tokens = guided.latents.shape[1] + guided.positive["prompt_embeds"].shape[1]
            assert f"{tokens} tokens" in case.title


def test_rows_are_the_demo_and_two_models_at_a_thousand_tokens():
    assert all(name == case.name for name, case in cfg_case.CASES.items())
    assert {"demo-128", "demo-512", "qwen-1280", "wan-1280"} < set(cfg_case.CASES)
    assert set(cfg.QUICK_ROWS) < set(cfg_case.CASES)


def test_the_list_names_every_row():
    result = CliRunner().invoke(cfg.main, ["--list"])
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()] == list(cfg_case.CASES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "demo-129"], "'demo-129' is unknown; legal: demo-128, demo-256"),
        (
            ["--modes", "rows"],
            "'rows'; legal: batched, branches, ring, ulysses, each also with single:, omni-cfgp:, "
            "omni-sp: or diffusers: in front",
        ),
        (["--rounds", "0"], "0 is not in the range"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(arguments: list[str], message: str):
    result = CliRunner().invoke(cfg.main, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_the_report_fits_a_hundred_columns():
    seconds = (123.4567, 124.4567)
    traffic = Traffic(123_456_789, 123_456_790.5, {"all_gather": 1}, {"broadcast": 6}, 12_345)
    measured = tuple(
        Measured(c.name, c.side, seconds, 1.2e-7, traffic if c.counts_traffic else None)
        for c in guidance_contestants()
    )
    cases = [
        CaseResult(case.title, 2, "diffusers", seconds, seconds, measured, 1.0, "first", "step")
        for case in cfg_case.CASES.values()
    ]
    console = Console(width=WIDTH)
    with console.capture() as capture:
        show(Report("guidance", [replace(case, counted="step") for case in cases]), console)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= WIDTH
    text = " ".join(" ".join(lines).split())
    for case in cfg_case.CASES.values():
        assert f"{case.title} on 2 ranks, 2 rounds; this machine allows 2.00 ×" in text
    for name in ("first", *(c.name for c in guidance_contestants())):
        assert text.count(f"│ {name} ") == len(cases)
    for part in ("ms/step", "MB/step", "per step of the busiest", "6 broadcast; 12,345 bytes"):
        assert part in text


@pytest.mark.slow
def test_two_ranks_race_and_each_sends_its_prediction_once_a_step(tmp_path: Path):
    path, picture = tmp_path / "report.json", tmp_path / "report.png"
    options = ["--rows", "demo-128", "--quick", "--rounds", "2"]
    result = CliRunner().invoke(cfg.main, [*options, "--json", str(path), "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    (case,) = json.loads(path.read_text())["cases"]
    found = {measured["name"]: measured for measured in case["measured"]}
    assert list(found) == [c.name for c in guidance_contestants()]
    assert len(case["single"]) == len(case["together"]) == 2
    for measured in found.values():
        assert measured["problem"] is None
        assert len(measured["seconds"]) == 2
        assert measured["error"] <= 1e-4
    branches, split = (found[name]["traffic"] for name in ("omni-cfgp branches", "omni-sp ulysses"))
    assert branches["calls"] == {"all_gather": 1}
    assert branches["bytes_sent"] == branches["formula"] == 64 * 32 * 4
    assert split["bytes_sent"] == split["formula"]
    assert picture.read_bytes().startswith(b"\x89PNG")
