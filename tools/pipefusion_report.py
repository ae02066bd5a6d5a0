"""Measure how far PipeFusion strays from the exact pictures, and draw it beside them.

The demonstration's model draws its prompts on one process, and on two stages with PipeFusion, for
each number of patches, exact steps and steps. The result depends on these alone, not on the number
of stages. Writes docs/reports/pipefusion.json, from which the tables of the guide and of
`omni_pp.pipefusion.quality` are taken, and draws docs/images/pipefusion.png.

    python tools/pipefusion_report.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from omni_parallel.demo.generate import generate
from omni_parallel.demo.pipeline import load_pipeline
from omni_parallel.demo.request import DemoRequest
from omni_parallel.demo.sheet import to_image
from omni_parallel_state import ParallelLayout, ParallelState
from omni_pp import PipeFusionConfig, apply_pipefusion
from omni_pp.pipefusion.quality import GOOD_ENOUGH, difference
from rank_harness import RankPool

DOCS = Path(__file__).parents[1] / "docs"
REPORT = DOCS / "reports" / "pipefusion.json"
PICTURE = DOCS / "images" / "pipefusion.png"
STAGES = 2
STEPS = (4, 6, 8, 10, 20, 50)
PATCHES = (2, 4, 8)
EXACT_STEPS = (1, 2, 3, 4)
AMPLIFIED = 4
SHOWN = ((2, 1, 20), (2, 1, 6), (4, 1, 4), (8, 1, 4))
"""Patches, exact steps and steps of the rows of the picture."""
SHOWN_PROMPTS = (4, 7)
_MARGIN, _LINE, _TITLE = 8, 20, 150


@dataclass(frozen=True)
class Row:
    """One setting, over all prompts."""

    patches: int
    exact_steps: int
    steps: int
    psnr: float
    """Mean of the prompts, in dB."""
    worst_psnr: float
    """Of the prompt that strays farthest."""
    largest: float
    """Largest difference of an element, of a range of 1."""


def compared(patches: int, exact_steps: int, found: Tensor, exact: Tensor, steps: int) -> Row:
    """A row of the report, from pictures of all prompts.

    Args:
        patches: Of the setting.
        exact_steps: Of the setting.
        found: Float of shape ``(prompts, 3, height, width)`` in [0, 1].
        exact: Likewise.
        steps: Of the setting.
    """
    each = [difference(one, other) for one, other in zip(found, exact, strict=True)]
    decibels = [one.psnr for one in each]
    return Row(
        patches,
        exact_steps,
        steps,
        round(sum(decibels) / len(decibels), 2),
        round(min(decibels), 2),
        round(max(one.largest for one in each), 4),
    )


def settings(steps: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """Patches, exact steps and steps of each row, but where all steps are exact."""
    for count in steps:
        for patches in PATCHES:
            for exact_steps in EXACT_STEPS:
                if exact_steps < count:
                    yield patches, exact_steps, count


@torch.no_grad()
def draw_all(
    request: DemoRequest, asked: Sequence[tuple[int, int, int]]
) -> dict[tuple[int, int, int], Tensor] | None:
    """On a rank: the pictures of each setting; those of one process under ``(1, 0, steps)``."""
    torch.set_num_threads(1)
    pipeline = load_pipeline(torch.device("cpu"))
    state = ParallelState(ParallelLayout(pp=dist.get_world_size()))
    found = {}
    for patches, exact_steps, steps in asked:
        this = DemoRequest(**asdict(request) | {"steps": steps})
        if (1, 0, steps) not in found:
            found[1, 0, steps] = generate(pipeline, this)
        config = PipeFusionConfig(patches=patches, warmup_steps=exact_steps, force=True)
        with apply_pipefusion(pipeline, config, state=state):
            found[patches, exact_steps, steps] = generate(pipeline, this)
    return found if dist.get_rank() == 0 else None


def on_stages(
    request: DemoRequest, asked: Sequence[tuple[int, int, int]]
) -> dict[tuple[int, int, int], Tensor]:
    """As `draw_all`, from this process."""
    with RankPool() as pool:
        found: dict[tuple[int, int, int], Tensor] | None = pool.run(
            draw_all, request, asked, world_size=STAGES, timeout=3600
        )[0]
    if found is None:
        msg = "rank 0 drew nothing"
        raise RuntimeError(msg)
    return found


def report(pictures: dict[tuple[int, int, int], Tensor]) -> list[Row]:
    """The rows of the report, from what `draw_all` gives."""
    return [
        compared(patches, exact_steps, found, pictures[1, 0, steps], steps)
        for (patches, exact_steps, steps), found in pictures.items()
        if exact_steps
    ]


def read_report(file: Path = REPORT) -> list[Row]:
    """The rows that were measured."""
    return [Row(**row) for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]


def write_report(rows: Sequence[Row], request: DemoRequest, file: Path) -> None:
    """Write the rows, one a line, and how they were made."""
    head = {
        "model": "of omni-parallel's demonstration",
        "prompts": len(request.prompts),
        "pixels": [request.width, request.height],
        "guidance": request.guidance,
        "seed": request.seed,
    }
    lines = ",\n".join(f"    {json.dumps(asdict(row))}" for row in rows)
    start = json.dumps(head, indent=2).removesuffix("\n}")
    file.write_text(f'{start},\n  "rows": [\n{lines}\n  ]\n}}\n', encoding="utf-8")


def table(rows: Sequence[Row]) -> str:
    """The table of the guide: PSNR of the worst prompt and largest difference."""
    steps = sorted({row.steps for row in rows})
    found = {(row.patches, row.exact_steps, row.steps): row for row in rows}
    lines = [
        "| patches | exact steps first | " + " | ".join(f"{count} steps" for count in steps) + " |",
        "|--:|--:|" + "--:|" * len(steps),
    ]
    for patches, exact_steps in sorted({(row.patches, row.exact_steps) for row in rows}):
        cells = [_cell(found.get((patches, exact_steps, count))) for count in steps]
        lines.append(f"| {patches} | {exact_steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return "exact"
    mark = "*" if row.worst_psnr < GOOD_ENOUGH else ""
    return f"{mark}{row.worst_psnr:.1f}, {row.largest:.2f}{mark}"


def draw(
    pictures: dict[tuple[int, int, int], Tensor], shown: Sequence[tuple[int, int, int]], out: Path
) -> None:
    """Draw for each setting some prompts: the exact picture, PipeFusion's, and the difference."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(13)
    side = pictures[shown[0]].shape[-1]
    across = 3 * (side + 2) + _MARGIN
    size = (_TITLE + len(SHOWN_PROMPTS) * across, 2 * _LINE + len(shown) * (side + _MARGIN))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for group in range(len(SHOWN_PROMPTS)):
        for column, title in enumerate(("exact", "PipeFusion", f"{AMPLIFIED} x difference")):
            left = _TITLE + group * across + column * (side + 2)
            pen.text((left, _LINE // 2), title, fill="black", font=font)
    for index, key in enumerate(shown):
        top = 2 * _LINE + index * (side + _MARGIN)
        patches, exact_steps, steps = key
        exact = pictures[1, 0, steps]
        row = compared(patches, exact_steps, pictures[key], exact, steps)
        text = (
            f"{patches} patches\n{steps} steps, {exact_steps} exact\n{row.psnr:.1f} dB in the mean"
        )
        pen.multiline_text((_MARGIN, top + _LINE), text, fill="black", font=font, spacing=6)
        for group, prompt in enumerate(SHOWN_PROMPTS):
            one, other = exact[prompt], pictures[key][prompt]
            for column, picture in enumerate((one, other, (other - one).abs() * AMPLIFIED)):
                sheet.paste(to_image(picture), (_TITLE + group * across + column * (side + 2), top))
            left = _TITLE + group * across + 2 * (side + 2) + 4
            text = f"{difference(other, one).psnr:.1f} dB"
            pen.text((left, top + side - _LINE), text, fill="white", font=font)
    sheet.save(out, format="PNG", optimize=True)


def main() -> None:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description="Measure how far PipeFusion strays.")
    parser.add_argument("--report", type=Path, default=REPORT, help="JSON file (%(default)s)")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="PNG file (%(default)s)")
    parser.add_argument("--keep", type=Path, help="also save all pictures, for torch.load")
    options = parser.parse_args()
    request = DemoRequest()
    pictures = on_stages(request, list(settings(STEPS)))
    if options.keep:
        torch.save(pictures, options.keep)
    rows = report(pictures)
    write_report(rows, request, options.report)
    draw(pictures, SHOWN, options.picture)
    print(table(rows))  # noqa: T201 - for the guide


if __name__ == "__main__":
    main()
