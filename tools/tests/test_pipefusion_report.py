"""The guide's table and the guard of PipeFusion say what was measured."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import omni_pp.pipefusion.quality as guard
from omni_group_coordinator import ParallelConfigError
from omni_parallel.demo.request import DemoRequest
from omni_pp import PipeFusionConfig
from pipefusion_report import (
    EXACT_STEPS,
    PATCHES,
    SHOWN,
    STEPS,
    Row,
    compared,
    draw,
    read_report,
    report,
    settings,
    table,
    write_report,
)

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "pipeline-stages.md"


def pictures(seed: int) -> torch.Tensor:
    return torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_every_setting_is_in_the_report_once() -> None:
    found = [(row.patches, row.exact_steps, row.steps) for row in read_report()]
    assert len(found) == len(set(found))
    assert set(found) == set(settings(STEPS))
    grid = set(itertools.product(PATCHES, EXACT_STEPS, STEPS))
    assert grid - set(found) == {(patches, 4, 4) for patches in PATCHES}
    assert set(SHOWN) <= set(found)


def test_the_guard_refuses_by_what_the_report_has() -> None:
    measured = {
        key: {row.steps: round(row.worst_psnr, 1) for row in rows}
        for key, rows in itertools.groupby(
            sorted(read_report(), key=lambda row: (row.patches, row.exact_steps, row.steps)),
            key=lambda row: (row.patches, row.exact_steps),
        )
    }
    assert measured == guard.MEASURED
    for row in read_report():
        config = PipeFusionConfig(row.patches, row.exact_steps)
        if row.worst_psnr < guard.GOOD_ENOUGH:
            with pytest.raises(ParallelConfigError, match="visibly stray"):
                guard.check_steps(config, {"num_inference_steps": row.steps})


def test_the_table_of_the_guide_is_that_of_the_report() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    part = text.split("<!-- quality:begin -->\n")[1].split("\n<!-- quality:end -->")[0]
    assert part == table(read_report())
    assert f"below {guard.GOOD_ENOUGH:g} dB, in italics" in text


def test_a_row_has_the_mean_the_worst_and_the_largest_of_its_prompts() -> None:
    exact = pictures(0)
    found = exact.clone()
    found[0] += 0.1  # 20 dB
    found[1:] += 0.01  # 40 dB
    found[3, 1, 5, 6] += 0.3
    row = compared(2, 1, found, exact, 6)
    assert (row.patches, row.exact_steps, row.steps) == (2, 1, 6)
    assert row.worst_psnr == pytest.approx(20, abs=0.01)
    assert 20 < row.psnr < 40
    assert row.largest == pytest.approx(0.31)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rows = [Row(2, 1, 4, 33.33, 30.5, 0.25), Row(4, 2, 50, 55.5, 50.25, 0.0625)]
    write_report(rows, DemoRequest(), tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == rows
    assert "| 2 | 1 | *30.5, 0.25* | exact |" in table(rows)


def test_rows_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    made = {(1, 0, 20): pictures(1), (2, 1, 20): pictures(2)}
    assert [(row.patches, row.steps) for row in report(made)] == [(2, 20)]
    draw(made, [(2, 1, 20)], tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
