"""The picture of the guide to stages is drawn from schedules that keep what stages can do."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from bench.pp_arithmetic import ideal, ideal_of_requests
from pp_picture import SCHEDULES, Schedule, draw


@pytest.mark.parametrize("stages", [2, 3])
def test_schedules_are_as_fast_as_arithmetic_says(stages: int) -> None:
    for branches, virtual in itertools.product((1, 2, 4), (1, 2)):
        found = Schedule("", branches, virtual).speed_up(stages)
        assert found == pytest.approx(ideal(stages, branches, virtual))
    for requests, branches in ((2, 2), (3, 2), (3, 1)):
        found = Schedule("", branches, requests=requests).speed_up(stages, steps=300)
        assert found == pytest.approx(ideal_of_requests(stages, requests, branches), rel=0.01)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
def test_no_rank_does_two_things_at_once(schedule: Schedule) -> None:
    boxes = schedule.boxes()
    for rank in {box.rank for box in boxes}:
        own = sorted((box.start, box.start + box.length) for box in boxes if box.rank == rank)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(own))


def test_every_schedule_is_drawn_alike_each_time(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        draw(SCHEDULES, tmp_path / name)
    text = (tmp_path / "one.svg").read_text()
    assert "<svg" in text
    assert text == (tmp_path / "two.svg").read_text()
