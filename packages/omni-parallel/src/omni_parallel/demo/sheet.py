"""The sheet of pictures that the demonstration writes."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

MARGIN = 12
BLOCKS_PER_ROW = 3
SHORTEST_SIDE = 128
"""Smaller pictures are enlarged by a whole factor until their shorter side has this many pixels."""
FONT_SIZE = 14
LINE = FONT_SIZE + 6


def write_sheet(path: Path, prompts: tuple[str, ...], columns: dict[str, Tensor]) -> None:
    """Write a PNG with a block for each prompt: its picture from each run, side by side.

    Args:
        path: Where to; its folder exists.
        prompts: One for each block.
        columns: Pictures by title: float of shape ``(prompts, 3, height, width)`` in [0, 1].
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(FONT_SIZE)
    height, width = next(iter(columns.values())).shape[-2:]
    factor = -(-SHORTEST_SIDE // min(height, width))
    height, width = height * factor, width * factor
    block = (len(columns) * (width + MARGIN // 2) + 2 * MARGIN, height + MARGIN + LINE)
    wide = min(BLOCKS_PER_ROW, len(prompts))
    high = -(-len(prompts) // wide)
    title = "  |  ".join(columns)
    # One small block may be narrower than the title of a long layout.
    across = MARGIN + max(wide * block[0], ceil(font.getlength(title)) + MARGIN)
    sheet = Image.new("RGB", (across, 2 * LINE + high * block[1]), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, LINE // 2), title, fill="black", font=font)
    for index, prompt in enumerate(prompts):
        left, top = MARGIN + index % wide * block[0], 2 * LINE + index // wide * block[1]
        for column, pictures in enumerate(columns.values()):
            picture = to_image(pictures[index]).resize((width, height))
            sheet.paste(picture, (left + column * (width + MARGIN // 2), top))
        draw.text((left, top + height + 2), prompt, fill="black", font=font)
    sheet.save(path, format="PNG")


def to_image(picture: Tensor) -> Image:
    """A picture of float ``(3, height, width)`` in [0, 1], quantised to 8 bits."""
    from PIL import Image

    values = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())
