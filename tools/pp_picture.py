"""Draw docs/images/pipeline-stages.svg: which rank computes what, and when.

The schedules are worked off as the ranks do it: in the order of the calls, each chunk as soon as
its rank is free and its input is there.

    python tools/pp_picture.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OUT = Path(__file__).parents[1] / "docs" / "images" / "pipeline-stages.svg"
STAGES = 2
STEPS = 3
_COLOURS = (("#2f6db5", "#86b3e3"), ("#b5532f", "#e8a98c"))


@dataclass(frozen=True)
class Box:
    """A chunk at work; times are in those of a whole stage."""

    rank: int
    start: float
    length: float
    step: int
    request: int
    branch: int


@dataclass(frozen=True)
class Schedule:
    """What is in flight on the stages.

    Attributes:
        name: Title.
        branches: Calls of each step.
        virtual: Chunks on each rank.
        requests: That run together; of these each has one chunk on a rank.
    """

    name: str
    branches: int = 1
    virtual: int = 1
    requests: int = 1

    def boxes(self, stages: int = STAGES, steps: int = STEPS) -> list[Box]:
        """Work all steps off."""
        free = [0.0] * stages
        arrived = [0.0] * self.requests
        found: list[Box] = []
        length = 1 / self.virtual
        for step in range(steps):
            for request in range(self.requests):
                ready = [arrived[request]] * self.branches
                for chunk in range(stages * self.virtual):
                    rank = chunk % stages
                    for branch in range(self.branches):
                        start = max(free[rank], ready[branch])
                        found.append(Box(rank, start, length, step, request, branch))
                        ready[branch] = free[rank] = start + length
                arrived[request] = max(ready)
        return found

    def speed_up(self, stages: int = STAGES, steps: int = STEPS) -> float:
        """Over one process, which computes everything in turn."""
        boxes = self.boxes(stages, steps)
        return sum(box.length for box in boxes) / max(box.start + box.length for box in boxes)


SCHEDULES = (
    Schedule("one image without guidance"),
    Schedule("two branches of guidance", branches=2),
    Schedule("two branches, two chunks on each rank", branches=2, virtual=2),
    Schedule("two requests of two branches, run together", branches=2, requests=2),
)


def draw(schedules: tuple[Schedule, ...], out: Path) -> None:
    """Write a row of boxes for each rank of each schedule."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.45 * len(schedules)), layout="constrained")
    axes = figure.subplots(len(schedules), 1, squeeze=False)[:, 0]
    for axis, schedule in zip(axes, schedules, strict=True):
        _draw_one(axis, schedule)
    with mpl.rc_context({"svg.hashsalt": "stages", "svg.fonttype": "path"}):
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def _draw_one(axis: Axes, schedule: Schedule) -> None:
    boxes = schedule.boxes()
    for box in boxes:
        colour = _COLOURS[box.request % 2][box.branch % 2]
        axis.broken_barh(
            [(box.start, box.length)], (box.rank - 0.4, 0.8), facecolors=colour, edgecolor="white"
        )
        middle = box.start + box.length / 2
        axis.text(middle, box.rank, str(box.step + 1), ha="center", va="center", color="white")
    speed_up = f"{schedule.speed_up():.2f} × as fast as one process"
    axis.set_title(f"{schedule.name}: {speed_up}", fontsize=9, loc="left")
    axis.set_yticks(range(STAGES), [f"rank {rank}" for rank in range(STAGES)], fontsize=8)
    axis.set_xlim(0, 4 * STEPS + 1)
    axis.invert_yaxis()
    axis.tick_params(length=0, labelbottom=False)
    axis.spines[:].set_visible(False)


def main() -> None:
    """Draw, and say how fast each schedule is."""
    parser = argparse.ArgumentParser(description="Draw the picture of the guide to stages.")
    parser.add_argument("--out", type=Path, default=OUT, help="SVG file (default: %(default)s)")
    out = parser.parse_args().out
    draw(SCHEDULES, out)
    for schedule in SCHEDULES:
        print(f"{schedule.name}: {schedule.speed_up():.2f} × in {STEPS} steps")  # noqa: T201


if __name__ == "__main__":
    main()
