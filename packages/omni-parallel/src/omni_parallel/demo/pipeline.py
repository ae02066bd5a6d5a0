"""The model that ships with the package, in an unmodified pipeline of diffusers."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from omni_group_coordinator import ParallelConfigError

if TYPE_CHECKING:
    from diffusers import FluxPipeline

MODEL = Path(__file__).parent / "model"
"""Folder of the trained model, in the format of diffusers; its README says how it was made."""


def load_pipeline(device: torch.device) -> FluxPipeline:
    """The demonstration model, in float32.

    Raises:
        ParallelConfigError: diffusers or transformers is not installed.
    """
    try:
        import diffusers
        import tqdm  # type: ignore[import-untyped]
        import transformers
    except ImportError as error:
        msg = f"the demonstration needs {error.name}; try: pip install 'omni-parallel[demo]'"
        raise ParallelConfigError(msg) from error
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        # Both draw bars for files that load in a moment, and warn of image processors that a
        # pipeline of text to image never calls.
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    # Also for bars that are off tqdm makes a semaphore of the system's, unless it is given a lock,
    # and Python warns of one that a process leaves behind, as a rank does that is ended.
    tqdm.tqdm.set_lock(threading.RLock())
    pipeline: FluxPipeline = diffusers.FluxPipeline.from_pretrained(
        MODEL, dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def token_pixels(pipeline: FluxPipeline) -> int:
    """Pixels of one side of a token: sizes of pictures are multiples of it."""
    return int(pipeline.vae_scale_factor) * 2
