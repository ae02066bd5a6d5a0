"""What the configuration of a model says that limits how it can be split; no weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

from torch import nn

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state.denoising.names import DENOISERS

Config = Mapping[str, Any]

_HEADS = ("num_attention_heads", "n_heads", "num_heads")
_BLOCKS = (
    "num_layers",
    "num_single_layers",
    "n_layers",
    "num_mmdit_layers",
    "num_single_dit_layers",
)
_SPATIAL = ("spatial_compression_ratio", "scale_factor_spatial")
_TEMPORAL = ("temporal_compression_ratio", "scale_factor_temporal")
_UNGUIDED = ("FluxTransformer2DModel", "Flux2Transformer2DModel")
"""Denoisers whose pipelines make one call in a step unless they are asked for another."""
_STAGES = ("block_out_channels", "encoder_block_out_channels")
_COMPRESSION = dict.fromkeys(
    ("AutoencoderKLQwenImage", "AutoencoderKLHunyuanVideo", "AutoencoderKLMochi"), 8
)
"""Of autoencoders whose configuration does not say it."""


@dataclass(frozen=True)
class ModelFacts:
    """What limits how a model can be split. None: not known."""

    name: str
    """Class of the pipeline or of the module."""
    denoiser: str | None = None
    """Class of what predicts the noise."""
    heads: int | None = None
    """Attention heads of a block."""
    blocks: int | None = None
    """Blocks that stages can share."""
    branches: int | None = None
    """Guidance branches that the model is usually called with; 1 where guidance is an input."""
    token_pixels: int | None = None
    """Pixels of one side of a token."""
    frames_per_token: int = 1
    """Frames of a video that one token covers, after the first."""
    has_vae: bool = False
    """Whether there is an autoencoder."""
    is_transformer: bool = True
    """Whether what predicts the noise works on a sequence of tokens."""

    @classmethod
    def of(cls, target: Any) -> ModelFacts:
        """Of a pipeline or module in this process."""
        if isinstance(target, nn.Module):
            return cls.from_configs(type(target).__name__, {"transformer": target})
        names = (*DENOISERS, "vae")
        found = {name: getattr(target, name, None) for name in names}
        modules = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
        return cls.from_configs(type(target).__name__, modules)

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelFacts:
        """Of a pipeline or model that diffusers saved.

        Raises:
            ParallelConfigError: The folder is none of these.
        """
        folder = Path(folder)
        index = folder / "model_index.json"
        if not index.is_file():
            if (folder / "config.json").is_file():
                config = read_table(folder / "config.json")
                return cls.from_configs(str(config.get("_class_name")), {"transformer": config})
            why = "is no folder" if not folder.is_dir() else "has no model_index.json"
            msg = (
                f"{folder} {why}; legal: a folder that a diffusers pipeline was saved to, which "
                "has a model_index.json, or a model, which has a config.json"
            )
            raise ParallelConfigError(msg)
        name = str(read_table(index).get("_class_name"))
        names = (*DENOISERS, "vae")
        paths = {part: folder / part / "config.json" for part in names}
        return cls.from_configs(
            name, {part: read_table(path) for part, path in paths.items() if path.is_file()}
        )

    @classmethod
    def from_configs(cls, name: str, parts: Mapping[str, Any]) -> ModelFacts:
        """Of the components of a pipeline: modules, or their configurations."""
        denoiser = next((part for part in DENOISERS if part in parts), None)
        vae = parts.get("vae")
        config = {} if denoiser is None else _config_of(parts[denoiser])
        kind = None if denoiser is None else _class_of(parts[denoiser])
        transformer = denoiser is not None and not str(kind).startswith(("UNet", "StableCascade"))
        pixels, frames = _token(config, vae) if transformer else (None, 1)
        counts = [config[key] for key in _BLOCKS if isinstance(config.get(key), int)]
        return cls(
            name,
            kind,
            _first(config, _HEADS) if transformer else None,
            sum(counts) if counts and transformer else None,
            _branches(kind, config) if config else None,
            pixels,
            frames,
            vae is not None,
            transformer,
        )

    def tokens(self, width: int, height: int, frames: int = 1) -> int | None:
        """Image tokens of a size in pixels, or None if that is not known."""
        if self.token_pixels is None:
            return None
        sides = (max(1, side // self.token_pixels) for side in (width, height))
        return next(sides) * next(sides) * (1 + (frames - 1) // self.frames_per_token)


def read_table(path: Path) -> dict[str, Any]:
    """The table in a JSON file, such as a configuration of diffusers.

    Raises:
        ParallelConfigError: It cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"cannot read {path}: {error}"
        raise ParallelConfigError(msg) from error
    if not isinstance(found, dict):
        msg = f"{path} holds a {type(found).__name__}; a configuration of diffusers is a table"
        raise ParallelConfigError(msg)
    return found


def _config_of(part: Any) -> Config:
    config = getattr(part, "config", part)
    if isinstance(config, Mapping):
        return config
    return vars(config) if hasattr(config, "__dict__") and not isinstance(part, Mapping) else {}


def _class_of(part: Any) -> str:
    if isinstance(part, nn.Module):
        return type(part).__name__
    return str(part.get("_class_name"))


def _first(config: Config, names: tuple[str, ...]) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def _branches(kind: str | None, config: Config) -> int:
    return 1 if config.get("guidance_embeds") or kind in _UNGUIDED else 2


def _token(config: Config, vae: Any) -> tuple[int | None, int]:
    """Pixels of one side of a token, and frames that it covers."""
    if vae is None:
        return None, 1
    about = _config_of(vae)
    stages = next((about[name] for name in _STAGES if about.get(name)), None)
    spatial = _first(about, _SPATIAL) or _COMPRESSION.get(_class_of(vae))
    if spatial is None and stages is not None:
        inner = about.get("patch_size")
        spatial = 2 ** (len(stages) - 1) * (inner if isinstance(inner, int) else 1)
    if spatial is None:
        return None, 1
    return spatial * _patch(config, about), _first(about, _TEMPORAL) or 1


def _patch(config: Config, about: Config) -> int:
    """Latent pixels of one side of a token: some pipelines pack them into channels before."""
    latent = about.get("latent_channels") or about.get("z_dim")
    channels = config.get("in_channels")
    if isinstance(latent, int) and isinstance(channels, int) and channels > latent:
        packed = isqrt(channels // latent)
        if packed**2 * latent == channels:
            return packed
    patch = config.get("patch_size") or config.get("all_patch_size") or 1
    return int(patch if isinstance(patch, int) else patch[-1])
