"""The work of a request, counted on modules without memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from omni_group_coordinator import ParallelConfigError
from omni_parallel.model_files import ModelFiles
from omni_parallel.plan.call_inputs import CallSize, DenoiserClass, blocks_of, denoiser_class
from omni_parallel.plan.default_size import default_size
from omni_parallel.plan.meta_modules import is_module, meta_module
from omni_parallel.plan.recorded_call import Recorded, record, weight_bytes
from omni_parallel.plan.workload import Workload
from omni_parallel_state.denoising.names import DENOISERS

ONE_CALL_FOR_EACH_BRANCH = frozenset(
    f"{name}Pipeline"
    for name in (
        "Flux",
        "FluxKontext",
        "Flux2",
        "Flux2Klein",
        "QwenImage",
        "Chroma",
        "OvisImage",
        "Lumina2",
        "CogView4",
        "Wan",
        "WanImageToVideo",
        "SkyReelsV2",
        "HunyuanVideo",
        "HunyuanVideo15",
        "HunyuanImage",
    )
)
"""Pipelines that call their denoiser once for each branch; others make one call for all."""

STEPS = 50


@dataclass(frozen=True)
class Asked:
    """What is to be made, None: as the pipeline does."""

    width: int | None = None
    height: int | None = None
    frames: int | None = None
    steps: int | None = None
    text: int | None = None
    guidance: bool | None = None
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Counted:
    """The work, what it was counted for, and what could not be."""

    work: Workload
    kind: DenoiserClass
    width: int
    height: int
    frames: int
    notes: list[str] = field(default_factory=list)


def count(files: ModelFiles, asked: Asked, said: Callable[[str], None]) -> Counted:
    """Count the work of a request.

    Args:
        files: Of the model.
        asked: The request.
        said: Is told what is being counted.

    Raises:
        ParallelConfigError: Something is not known of the model, or the size is none.
    """
    name, dtype = files.denoiser, getattr(torch, asked.dtype)
    kind = denoiser_class(files.components[name][1])
    said(f"counting {files.components[name][1]}")
    denoiser = _module(files, name, dtype)
    notes: list[str] = []
    vae = _module(files, "vae", dtype) if "vae" in files.components else None
    spatial, temporal = _compression(vae, kind, notes)
    config: Any = denoiser.config
    usual = default_size(files.defaults, config, spatial)
    width = asked.width or usual.width
    height = asked.height or usual.height
    frames = asked.frames or usual.frames
    text = (files.text_tokens if asked.text is None else asked.text) + kind.more_text
    size = CallSize(height // spatial, width // spatial, 1 + (frames - 1) // temporal, text, dtype)
    recorded = _called(denoiser, kind, size, (width, height))
    del denoiser
    decode = None
    if vae is not None:
        said(f"counting {type(vae).__name__}")
        decode = _decoded(vae, size, notes)
    weights = _weights(files, dtype, notes, said)
    guided = (files.facts.branches or 1) > 1 if asked.guidance is None else asked.guidance
    work = Workload(
        recorded,
        decode,
        2 if guided else 1,
        files.facts.name not in ONE_CALL_FOR_EACH_BRANCH,
        asked.steps or _default(files, "num_inference_steps", STEPS),
        text,
        dtype.itemsize,
        sum(one in files.components for one in DENOISERS if one.startswith("transformer")) or 1,
        weights,
    )
    return Counted(work, kind, width, height, frames, notes)


def _default(files: ModelFiles, name: str, otherwise: int) -> int:
    found = files.defaults.get(name)
    return found if isinstance(found, int) else otherwise


def _module(files: ModelFiles, name: str, dtype: torch.dtype) -> nn.Module:
    return meta_module(files.folder / name, *files.components[name], dtype)


def _called(
    denoiser: nn.Module, kind: DenoiserClass, size: CallSize, pixels: tuple[int, int]
) -> Recorded:
    name = type(denoiser).__name__
    try:
        inputs = kind.inputs(denoiser.config, size)
        found = record(
            denoiser, lambda: denoiser(**inputs, return_dict=False), blocks_of(denoiser, kind)
        )
        if not found.output_bytes:
            raise ParallelConfigError("that is no token")  # noqa: EM101
    except Exception as error:
        msg = (
            f"{name} cannot be called for {pixels[0]} x {pixels[1]} pixels, a latent of "
            f"{size.width} x {size.height} with {size.frames} frames and {size.text} tokens of "
            f"text: {error}"
        )
        raise ParallelConfigError(msg) from error
    return found


def _latent(
    vae: nn.Module, frames: int, height: int, width: int, dtype: torch.dtype
) -> torch.Tensor:
    config: Any = vae.config
    channels = config.get("latent_channels") or config.get("z_dim")
    video = any(isinstance(module, nn.Conv3d) for module in vae.modules())
    sides = (frames, height, width) if video else (height, width)
    return torch.empty((1, channels, *sides), dtype=dtype, device="meta")


def _compression(vae: nn.Module | None, kind: DenoiserClass, notes: list[str]) -> tuple[int, int]:
    """Pixels of one side of a latent position, and frames of a latent frame after the first."""
    if vae is None:
        notes.append(
            f"there is no autoencoder: a latent position is taken for {kind.spatial} x "
            f"{kind.spatial} pixels and {kind.temporal} frames, and decoding is left out"
        )
        return kind.spatial, kind.temporal
    side = 8
    try:
        latent = _latent(vae, 2, side, side, next(vae.parameters()).dtype)
        with torch.no_grad(), torch.device("meta"):
            (sample,) = vae.decode(latent, return_dict=False)  # type: ignore[operator]
    except Exception as error:  # of autoencoders with more inputs
        notes.append(
            f"{type(vae).__name__} does not decode a latent alone ({error}): a latent position is "
            f"taken for {kind.spatial} x {kind.spatial} pixels and {kind.temporal} frames"
        )
        return kind.spatial, kind.temporal
    return sample.shape[-1] // side, sample.shape[2] - 1 if sample.ndim == latent.ndim == 5 else 1


def _decoded(vae: nn.Module, size: CallSize, notes: list[str]) -> Recorded | None:
    latent = _latent(vae, size.frames, size.height, size.width, size.dtype)
    try:
        return record(vae, lambda: vae.decode(latent, return_dict=False))  # type: ignore[operator]
    except Exception as error:
        notes.append(f"decoding is left out: {type(vae).__name__} cannot be counted: {error}")
        return None


def _weights(
    files: ModelFiles, dtype: torch.dtype, notes: list[str], said: Callable[[str], None]
) -> dict[str, int]:
    """Bytes of what is held beside the denoisers."""
    found = {}
    for name, (library, class_name) in files.components.items():
        if name in DENOISERS or name == "" or not is_module(library, class_name):
            continue
        said(f"counting {class_name}")
        try:
            found[name] = weight_bytes(_module(files, name, dtype))
        except ParallelConfigError as error:
            notes.append(f"the weights of {name} are left out: {error}")
    return found
