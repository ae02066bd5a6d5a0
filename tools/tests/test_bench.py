"""The benchmarks count and divide right, fit a terminal, and run on ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from bench import sp, sp_case
from bench.arithmetic import attention_units, ceiling, pairwise_ratio, spread
from bench.contestants import chosen, contestants
from bench.counts import DispatchCount
from bench.harness import Progress
from bench.host_time import STEPS, host_case
from bench.models import FAMILIES, build, inputs, near_square, shorten, text_and_image
from bench.plot import plot
from bench.report import WIDTH, show
from bench.results import CaseResult, HostCost, HostResult, Measured, Report, Traffic


def test_a_ratio_is_taken_within_each_round_so_that_drift_cancels():
    drift = [1.0, 5.0, 2.0, 40.0]
    assert pairwise_ratio([2 * d for d in drift], drift) == pairwise_ratio([2.0] * 4, [1.0] * 4)
    assert pairwise_ratio([2 * d for d in drift], drift).median == 2.0


def test_a_spread_is_the_median_with_its_quartiles():
    found = spread([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (found.low, found.median, found.high) == (2.0, 3.0, 4.0)
    assert spread([7.0]).low == spread([7.0]).median == spread([7.0]).high == 7.0


@pytest.mark.parametrize(("left", "right"), [([1.0], [1.0, 2.0]), ([], [])])
def test_rounds_that_do_not_pair_are_an_error(left: list[float], right: list[float]):
    with pytest.raises(ValueError, match=r"zip|no values"):
        pairwise_ratio(left, right)


def test_ranks_that_slow_each_other_lower_the_ceiling():
    assert ceiling([1.0, 1.0], [1.0, 1.0], 2) == 2.0
    assert ceiling([1.0, 1.0], [2.0, 2.0], 4) == 2.0


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_units_of_one_degree_are_the_published_formulas(ranks: int, share: float):
    ulysses = (2 + 2 * share) * (ranks - 1) / ranks**2
    assert attention_units(ranks, 1, share) == pytest.approx(ulysses)
    assert attention_units(1, ranks, share) == pytest.approx(2 * share * (ranks - 1) / ranks)


def test_units_of_a_hybrid_count_both_exchanges():
    # Of 4 ranks each holds a quarter. Query, key, value and result: half of it goes to the other
    # rank of the pair. Then key and value go to the other pair, whole.
    assert attention_units(2, 2) == 4 * 0.25 / 2 + 2 * 0.25
    assert attention_units(1, 1) == 0.0


def test_every_contestant_uses_all_ranks():
    for ranks in (2, 3, 4, 8):
        assert {c.ulysses * c.ring for c in contestants(ranks)} == {ranks}
    assert "omni-sp u2-allgather2" in {c.name for c in contestants(4)}


def test_a_mode_names_contestants_of_both_sides_or_of_one():
    assert [c.name for c in chosen(2, ("ulysses",))] == ["omni-sp ulysses", "diffusers ulysses"]
    assert [c.name for c in chosen(2, ("diffusers:ring",))] == ["diffusers ring"]
    with pytest.raises(ValueError, match=r"'ringo'; legal: allgather, ring, ulysses"):
        chosen(2, ("ringo",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "flux-321"], "'flux-321' is unknown; legal: flux-320"),
        (["--model", "flax"], "'flax' is unknown; legal: flux, qwen, wan"),
        (["--rows", "flux-320", "--model", "wan"], "none of the rows flux-320 is of wan"),
        (["--rows", "flux-320", "--tokens", "64"], "exclude each other"),
        (["--tokens", "many"], "--tokens takes whole numbers of at least 10; got 'many'"),
        (["--ranks", "1"], "--ranks takes whole numbers of at least 2; got '1'"),
        (["--ranks", "2", "--modes", "u2-ring2"], "no contestant on 2 ranks"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(arguments: list[str], message: str):
    result = CliRunner().invoke(sp.main, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_rows_cover_the_sizes_that_the_rivals_were_measured_at():
    assert {"flux-320", "flux-1280", "flux-4608", "flux-1280-bf16", "flux-1280-compiled"} < set(
        sp_case.CASES
    )
    assert {"qwen-1280", "wan-1280", "wan-4500"} < set(sp_case.CASES)
    assert all(name == case.name for name, case in sp_case.CASES.items())


@pytest.mark.parametrize("tokens", [10, 40, 320, 1280, 4500, 4608, 8192])
def test_text_and_image_are_all_tokens(tokens: int):
    assert sum(text_and_image(tokens)) == tokens
    height, width = near_square(tokens)
    assert height * width == tokens
    assert height <= width


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shorter_twin_lacks_one_attention_and_leaves_the_model_alone(family: str):
    with torch.no_grad():
        model, arguments = build(family, 3, head_dim=16), inputs(family, 20)
        before = model(**arguments)[0]
        counts = []
        for each in (model, shorten(family, model)):
            with DispatchCount() as count:
                each(**arguments)
            kernels = {name: n for name, n in count.kernels.items() if "attention" in name}
            counts.append(sum(kernels.values()))
        assert torch.equal(model(**arguments)[0], before)
    attentions = 2 if family == "wan" else 1  # and one to the text, which stays local
    assert counts == [3 * attentions, 2 * attentions]


def test_views_and_allocations_are_no_kernels():
    tensor = torch.ones(2, 3)
    with DispatchCount() as count:
        torch.empty(2)
        tensor.t().contiguous()
        tensor.view(6) + 1
    assert count.kernels == {"aten.clone": 1, "aten.add": 1}
    assert not count.communication


def test_progress_counts_steps(tmp_path: Path):
    progress = Progress(tmp_path / "steps")
    assert progress.done() == 0
    progress.step()
    progress.step(3)
    assert progress.done() == 4


def wide_report() -> Report:
    """A report with the longest names and numbers, a contestant that cannot, and a failure."""
    seconds = tuple(123.4567 + i for i in range(5))
    traffic = Traffic(123_456_789, 123_456_790.5, {"all_to_all": 2})
    measured = (
        *(
            Measured(c.name, c.side, seconds, 1.234e-7, traffic if c.side == "omni-sp" else None)
            for c in contestants(128)
        ),
        Measured("omni-sp other", "omni-sp", problem="ParallelConfigError: " + "long " * 99),
    )
    single = tuple(2 * s for s in seconds)
    case = sp_case.Case("flux", 123_456, 99, torch.bfloat16, compiled=True)
    costs = tuple(
        HostCost(m.name, 12_345.6, 123_456.7, 123.4, {"all_to_all_single": 4, "all_gather": 12})
        for m in measured
    )
    return Report(
        "sequence parallelism",
        [CaseResult(case.title, 128, "diffusers", single, single, measured, 0.5)],
        [HostResult("flux, 6 layers", 128, 12_345.6, 123.4, costs, 1234.5, 0.01)],
        {"flux-320 on 2 ranks": "rank 1 died"},
    )


def test_the_report_fits_a_hundred_columns():
    console = Console(width=WIDTH)
    with console.capture() as capture:
        show(wide_report(), console)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= WIDTH
    text = " ".join(" ".join(lines).split())
    for name in (*(c.name for c in contestants(128)), "omni-sp other"):
        assert text.count(f"│ {name} ") == 2  # whole, in both tables
    for part in ("123.457 ≠", "gives 123,456,790", "cannot", "rank 1 died", "1e-07", "50% of its"):
        assert part in text


def test_the_report_is_written_as_json_with_what_follows_from_the_samples(tmp_path: Path):
    path = tmp_path / "report.json"
    wide_report().write(path)
    (case,) = json.loads(path.read_text())["cases"]
    assert case["ceiling"] == 128.0
    assert case["measured"][0]["speed_up"]["median"] == pytest.approx(2.0)
    assert case["measured"][0]["against_rival"]["median"] == 1.0
    assert case["measured"][-1]["speed_up"] is None
    assert list(tmp_path.iterdir()) == [path]


def test_the_plot_is_a_picture(tmp_path: Path):
    path = tmp_path / "report.png"
    plot(wide_report(), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no finished case"):
        plot(Report("nothing"), path)


@pytest.mark.slow
def test_two_ranks_race_and_a_contestant_that_cannot_leaves(tmp_path: Path):
    path = tmp_path / "report.json"
    options = ["--model", "flux", "--tokens", "40,41", "--modes", "ulysses", "--rounds", "2"]
    options.append("--no-host")
    result = CliRunner().invoke(sp.main, [*options, "--json", str(path)])
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    even, odd = report["cases"]
    for case in (even, odd):
        ours = case["measured"][0]
        assert len(ours["seconds"]) == len(case["single"]) == 2
        assert ours["error"] <= 1e-5
    assert even["measured"][0]["traffic"]["bytes_sent"] == even["measured"][0]["traffic"]["formula"]
    assert sum(even["measured"][0]["traffic"]["calls"].values()) <= 2
    assert even["measured"][1]["problem"] is None
    assert "divisible" in odd["measured"][1]["problem"]
    assert odd["measured"][1]["seconds"] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch, at what diffusers calls
def test_the_host_s_costs_are_counted_without_any_other_rank(ranks: Any, tmp_path: Path):
    progress = Progress(tmp_path / "steps")
    teams = chosen(4, ("ulysses", "omni-sp:allgather"))
    (found,) = ranks.run(host_case, progress, "flux", 4, teams, 3, world_size=1, init=False)
    assert [cost.problem for cost in found.costs] == [None] * 3
    ulysses, allgather, diffusers = (sum(cost.collectives.values()) for cost in found.costs)
    assert ulysses <= 2
    assert allgather <= 2
    assert diffusers == 4
    assert all(cost.microseconds and cost.meta_microseconds for cost in found.costs)
    assert progress.done() == STEPS
