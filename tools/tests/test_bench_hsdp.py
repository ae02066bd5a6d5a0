"""The benchmark of sharded weights sees memory, judges by its bars, and runs on ranks."""

from __future__ import annotations

import json
import mmap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from bench import hsdp, hsdp_case
from bench.harness import Harness
from bench.hsdp_case import ShardedCase
from bench.hsdp_contestants import WHOLE, ShardingContestant, sharding_contestants
from bench.hsdp_memory import Baseline, Watch, return_what_is_freed
from bench.hsdp_report import markdown, sharded_parts
from bench.hsdp_results import (
    AHEAD,
    ONCE,
    OWN,
    PLAIN,
    Memory,
    Peaks,
    ShardedMeasured,
    ShardedResult,
)
from bench.report import WIDTH, show
from bench.results import CaseResult, Report
from rank_harness import RankPool

TINY = ShardedCase("flux", 40, 3, head_dim=16)
SIZE = 40_000_000
SLACK = 4_000_000


def hold(path: Path) -> tuple[Peaks, Peaks, Peaks]:
    return_what_is_freed()
    torch.ones(2**20).sum()
    baseline = Baseline()
    with Watch(baseline) as gone:
        brief = torch.ones(SIZE // 4)
        time.sleep(0.2)  # more than one sample of what is held
        del brief
    with Watch(baseline) as kept:
        held = torch.ones(SIZE // 4)
        time.sleep(0.2)
    with path.open("rb") as file, Watch(baseline) as mapped:
        del held
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            sum(pages[:: mmap.PAGESIZE])
    return gone.peaks(), kept.peaks(), mapped.peaks()


def test_peaks_are_those_of_the_block_and_pages_of_files_count_apart(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * SIZE)
    with RankPool() as fresh:  # a process that was used before has freed pages at hand
        found = fresh.run(hold, path, world_size=1)
    for gone, kept, mapped in found:
        for peaks in (gone, kept):
            assert abs(peaks.anonymous - SIZE) < SLACK
            assert abs(peaks.resident - SIZE) < SLACK
        assert abs(mapped.resident - SIZE) < 2 * SLACK


def result_of(case: ShardedCase, ranks: int = 2, **seconds: float) -> ShardedResult:
    """Made up, with large numbers; every contestant takes as long as the whole model."""
    peaks = Peaks(12_345_000_000, 23_456_000_000)
    measured = tuple(
        ShardedMeasured(
            c.name,
            c.side,
            (seconds.get(c.mode.replace("-", "_"), 100.0),) * 3,
            0.0,
            mode=c.mode,
            memory=Memory(peaks, peaks),
        )
        for c in sharding_contestants(ranks)
    )
    return ShardedResult(
        case.title,
        ranks,
        PLAIN,
        (100.0,) * 3,
        (100.0,) * 3,
        measured,
        model=40_000_000_000,
        block=2_000_000_000,
    )


def test_the_report_fits_a_hundred_columns_and_says_each_bar():
    cases = [result_of(case, ranks) for case in hsdp_case.CASES.values() for ranks in (1, 2, 4)]
    console = Console(width=WIDTH)
    with console.capture() as capture:
        show(Report("weights", list[CaseResult](cases)), console, sharded_parts)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "…" not in capture.get()
    text = " ".join(" ".join(lines).split())
    for case in cases:
        assert f"{case.case} on {case.ranks} rank" in text
        for measured in case.measured:
            assert f"│ {measured.name} " in text
    for part in ("23456 (12345)", "met: loading takes at most a share and 2 blocks, 24000 MB"):
        assert part in text
    assert text.count("met: outputs are those of the whole model: 0") == 6
    assert text.count("NOT MET: loading") == 2, "four ranks have a smaller share"


def bars(case: ShardedResult) -> dict[str, bool]:
    return {bar.what.split()[0]: bar.met for bar in case.bars()}


def test_bars_are_met_or_not():
    tiny = result_of(TINY)
    assert bars(tiny) == dict.fromkeys(("loading", "gathered", "one", "outputs"), True)
    assert bars(replace(tiny, model=30_000_000_000))["loading"] is False
    assert bars(result_of(TINY, gathered=105.1))["gathered"] is False
    assert bars(result_of(TINY, gathered=104.9))["gathered"] is True
    assert bars(result_of(TINY, prefetch_1=102.0))["one"] is False
    assert bars(result_of(TINY, prefetch_1=100.4))["one"] is True
    wrong = [replace(m, error=1e-9 if m.mode == "offload" else 0.0) for m in tiny.measured]
    assert bars(replace(tiny, measured=tuple(wrong)))["outputs"] is False
    assert bars(result_of(TINY, ranks=1)) == {"outputs": True}
    assert bars(replace(tiny, measured=())) == {}


def test_the_time_of_the_whole_model_is_that_of_all_ranks_at_once():
    case = replace(result_of(TINY), together=(50.0,) * 3)
    once = case.find(OWN, ONCE)
    assert once is not None
    found = case.ratios(once)["against_whole"]
    assert found is not None
    assert found.median == 2.0


def test_the_markdown_table_has_a_row_for_each_contestant():
    cases = [result_of(TINY, ranks) for ranks in (1, 2)]
    text = markdown(cases)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "|--" not in line]
    assert len(rows) == 1 + 2 + len(sharding_contestants(2))
    assert all(row.count("|") == 7 for row in rows)
    expected = "| omni-hsdp gathered | 2 | 23456 (12345) | 23456 (12345) | 100000 | 1.00 |"
    assert expected in rows


def test_rows_are_large_enough_and_named_by_themselves():
    for name, case in hsdp_case.CASES.items():
        assert case.name == name
        with torch.device("meta"):
            assert sum(p.numel() for p in case.build().parameters()) * 4 > 400e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "flux-1"], "'flux-1' is unknown; legal: flux-512, qwen-512, flux-64"),
        (["--ranks", "0"], "--ranks takes whole numbers of at least 1; got '0'"),
        (["--modes", "prefetch-3"], "is called 'prefetch-3'; legal: "),
        (["--rounds", "0"], "0 is not in the range"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(arguments: list[str], message: str):
    result = CliRunner().invoke(hsdp.main, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_the_list_names_every_row():
    result = CliRunner().invoke(hsdp.main, ["--list"])
    assert result.exit_code == 0
    found = [line.split()[0] for line in result.output.splitlines()]
    assert found == [*hsdp_case.CASES, *hsdp_case.QUICK_CASES]


def test_one_rank_takes_part_with_fewer_modes():
    given = {"rows": (), "modes": (ONCE, AHEAD), "rounds": None, "json_path": None}
    given |= {"quick": True, "ranks": ("1", "2"), "markdown_path": None}
    one, two = hsdp.parse(given).teams
    assert one.contestants == (ShardingContestant(OWN, AHEAD),)
    assert [c.mode for c in two.contestants] == [AHEAD, ONCE]


@pytest.mark.slow
def test_every_contestant_has_the_outputs_of_the_whole_model(tmp_path: Path):
    folder, team = str(tmp_path), sharding_contestants(2)
    with Harness(lambda _: None) as harness:
        harness.run(hsdp_case.write_checkpoint, 1, TINY, folder)
        memory = {
            c.name: harness.run(hsdp_case.memory_case, 2, TINY, c, folder)
            for c in team
            if c.mode in ("everywhere", ONCE)
        }
        result = harness.run(hsdp_case.race_case, 2, TINY, team, 2, folder, memory)
    assert [m.name for m in result.measured] == [c.name for c in team]
    for measured in result.measured:
        assert measured.problem is None, measured.name
        assert measured.error == 0, measured.name
        assert len(measured.seconds) == 2
    assert result.model > result.block > 0
    assert result.measured[0].memory == memory[f"{WHOLE} everywhere"]


@pytest.mark.slow
def test_the_command_writes_json_and_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hsdp, "QUICK_CASES", {TINY.name: TINY})
    path, table = tmp_path / "report.json", tmp_path / "table.md"
    options = ["--quick", "--rounds", "1", "--ranks", "2", "--modes", f"defaults,{AHEAD}"]
    result = CliRunner().invoke(
        hsdp.main, [*options, "--json", str(path), "--markdown", str(table)]
    )
    assert result.exit_code == 0, result.output
    (case,) = json.loads(path.read_text())["cases"]
    plain, ahead = case["measured"]
    assert (plain["mode"], ahead["mode"]) == ("defaults", AHEAD)
    assert ahead["against_whole"]["median"] > 0
    assert ahead["memory"]["loading"]["resident"] > 0
    assert f"| omni-hsdp {AHEAD} | 2 |" in table.read_text()
