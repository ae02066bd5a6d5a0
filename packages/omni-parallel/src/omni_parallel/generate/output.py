"""Files of images and videos."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omni_group_coordinator import ParallelConfigError

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
VIDEOS = (".gif", ".mp4")
_MILLISECONDS = 62  # of a frame, which are 16 in a second


def check_output(out: Path) -> None:
    """Refuse a file that cannot be written, before a rank starts.

    Raises:
        ParallelConfigError: Its folder is not there or not writable, or its format is unknown.
    """
    folder = out.parent
    # Not Path.is_dir, which raises where a folder above may not be searched.
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        msg = f"cannot write {out}: {folder.absolute()} is no folder that can be written to"
        raise ParallelConfigError(msg)
    if out.exists() and (out.is_dir() or not os.access(out, os.W_OK)):
        msg = f"cannot write {out}: it is there, and no file that can be written to"
        raise ParallelConfigError(msg)
    if out.suffix.lower() not in IMAGES + VIDEOS:
        legal = ", ".join(IMAGES + VIDEOS)
        msg = f"{out} has an unknown format; legal: {legal}; nearest: {out.with_suffix('.png')}"
        raise ParallelConfigError(msg)


def check_format(out: Path, videos: bool | None) -> None:
    """Refuse a format in which what the pipeline makes cannot be written.

    Args:
        out: File.
        videos: Whether the pipeline makes videos, as opposed to images; None: not known.

    Raises:
        ParallelConfigError: It is one of videos for images, or what writes it is not installed.
    """
    if out.suffix.lower() != ".mp4":
        return
    if videos is False:
        legal = ", ".join((*IMAGES, ".gif"))
        msg = (
            f"{out} is a format of videos, and the pipeline makes images; legal: {legal}; "
            f"nearest: {out.with_suffix('.png')}"
        )
        raise ParallelConfigError(msg)
    # As diffusers does: OpenCV only where imageio is not there.
    if find_spec("imageio_ffmpeg" if find_spec("imageio") else "cv2") is None:
        msg = (
            f"cannot write {out}: .mp4 needs imageio; try: pip install imageio imageio-ffmpeg; "
            f"nearest: {out.with_suffix('.gif')}"
        )
        raise ParallelConfigError(msg)


def save(pictures: list[Any], out: Path) -> list[Path]:
    """Write images, or videos as lists of frames: one to the file, several beside it.

    Args:
        pictures: PIL images, or lists of them.
        out: File; of several pictures, and of the frames of a video that is written as images,
            its name with a number.

    Returns:
        What was written.
    """
    several = len(pictures) > 1
    paths = [out.with_stem(f"{out.stem}-{i}") if several else out for i in range(len(pictures))]
    written = []
    for picture, path in zip(pictures, paths, strict=True):
        if isinstance(picture, list):
            written += _save_video(picture, path)
        else:
            picture.save(path)
            written.append(path)
    return written


def _save_video(frames: list[Any], path: Path) -> list[Path]:
    if path.suffix.lower() == ".mp4":
        from diffusers.utils import export_to_video

        export_to_video(frames, str(path), fps=16)
        return [path]
    if path.suffix.lower() != ".gif":
        each = [path.with_stem(f"{path.stem}-{index:04d}") for index in range(len(frames))]
        for frame, file in zip(frames, each, strict=True):
            frame.save(file)
        return each
    first, *rest = frames
    first.save(path, save_all=True, append_images=rest, duration=_MILLISECONDS, loop=0)
    return [path]
