"""The page of benchmarks says what the files of results say, and none that were disturbed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import benchmarks_page
from bench.results import CaseResult, Measured, Report
from benchmarks_page import BENCHMARKS, DOCS, draw, drawn, page, read_results, updated


def results(folder: Path, core_share: float = 1.0) -> Path:
    """A folder of documentation with results of one benchmark, as benchmarks write them."""
    measured = (
        Measured("omni-sp ulysses", "omni-sp", (0.5, 0.52, 0.51), 2e-7),
        Measured("diffusers ulysses", "diffusers", (0.8, 0.8, 0.81), 3e-7),
        Measured("diffusers ring", "diffusers", problem="heads | do not divide\nTraceback"),
    )
    case = CaseResult(
        "flux, 1024 tokens",
        2,
        "diffusers",
        (1.0, 1.02, 1.01),
        (1.1, 1.1, 1.1),
        measured,
        core_share,
    )
    (folder / "results").mkdir()
    report = Report("sp", [case], failures={"wan": "rank 1 failed\nTraceback"})
    report.write(folder / "results" / "sp.json")
    return folder


def test_a_table_has_the_medians_and_what_could_not_run(tmp_path: Path) -> None:
    text = page(results(tmp_path))
    assert "| single process | | 1010 | 1.00 × | | | |" in text
    assert "| omni-sp ulysses | omni-sp | 510 | 1.98 × | 1.97–1.99 | 1.59 × | 2e-07 |" in text
    assert "| diffusers ring | diffusers |  | could not run: heads / do not divide |" in text
    assert "**flux, 1024 tokens**, 2 ranks, 3 rounds. This machine allows 1.84 ×." in text
    assert "Not measured: wan: rank 1 failed" in text
    assert "Traceback" not in text
    assert "torch 2." in text


def test_without_results_the_page_says_how_to_get_them(tmp_path: Path) -> None:
    text = page(tmp_path)
    for name, title in BENCHMARKS.items():
        assert f"## {title}" in text
        assert f"`hatch run bench {name} --json docs/results/{name}.json`" in text


def test_disturbed_results_are_refused(tmp_path: Path) -> None:
    results(tmp_path, core_share=0.9)
    with pytest.raises(ValueError, match=r"sp\.json: other work left the ranks 90%"):
        page(tmp_path)


def test_a_picture_has_the_speed_ups_of_the_file(tmp_path: Path) -> None:
    results(tmp_path)
    found = read_results(tmp_path, "sp")
    assert found is not None
    found["cases"][0]["measured"][0]["speed_up"] = {"low": 1.1, "median": 1.2, "high": 1.3}
    case = drawn(found["cases"][0])
    speed = case.speed_up(case.measured[0])
    assert speed is not None
    assert speed.median == 1.2
    assert case.speed_up(case.measured[2]) is None
    draw(tmp_path, "sp")
    draw(tmp_path, "cfg")
    pictures = [one.name for one in (tmp_path / "images").iterdir()]
    assert pictures == ["benchmark-sp.png"]


def test_the_page_is_that_of_the_results() -> None:
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert updated(DOCS, text) == text, "run python tools/benchmarks_page.py"
    for name in BENCHMARKS:
        file = DOCS / "results" / f"{name}.json"
        assert not file.is_file() or json.loads(file.read_text())["cases"]
        picture = benchmarks_page.DOCS / "images" / f"benchmark-{name}.png"
        assert picture.is_file() == file.is_file()
