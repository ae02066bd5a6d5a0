"""The sheet of pictures has room for everything that is written on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from omni_parallel.demo.sheet import FONT_SIZE, MARGIN, write_sheet

pytest.importorskip("PIL")


def test_the_title_of_a_long_layout_fits_above_one_small_picture(tmp_path: Path) -> None:
    from PIL import Image, ImageFont

    titles = ("one process", "16 ranks (cfg=2, ring=2, ulysses=4)")
    write_sheet(
        tmp_path / "a.png", ("a red circle",), dict.fromkeys(titles, torch.rand(1, 3, 8, 8))
    )
    needed = ImageFont.load_default(FONT_SIZE).getlength("  |  ".join(titles)) + 2 * MARGIN
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width >= needed
