"""What an autoencoder takes and gives: channels, dimensions, and how much finer its samples are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omni_group_coordinator import ParallelConfigError
from omni_vae_patch.spatial.convolutions import least_rows
from omni_vae_patch.spatial.padding import rows_for_padding
from omni_vae_patch.spatial.whole_outputs import sharded_tensor

_CHANNELS = ("latent_channels", "z_dim")


@dataclass(frozen=True)
class Geometry:
    """The shape of an autoencoder's latents and samples.

    Attributes:
        channels: Of a latent.
        sample_channels: Of a sample; ``None`` if that is not known.
        is_video: Whether latents have frames: ``(batch, channels, frames, height, width)``.
        scale: Rows of a sample for each row of a latent.
        least: Rows of a latent that a rank needs.
    """

    channels: int
    sample_channels: int | None
    is_video: bool
    scale: int
    least: int

    @property
    def ndim(self) -> int:
        """Dimensions of a latent."""
        return 5 if self.is_video else 4

    def check_latent(self, z: Tensor) -> None:
        """Check a latent before anything is sent.

        Raises:
            ParallelConfigError: It has other dimensions or channels.
        """
        self._check(z, "latent", "decodes", self.channels)

    def check_sample(self, x: Tensor) -> None:
        """Check a sample before anything is sent.

        Raises:
            ParallelConfigError: It has other dimensions or channels.
        """
        self._check(x, "sample", "encodes", self.sample_channels)

    @property
    def _sides(self) -> str:
        frames = "frames, " if self.is_video else ""
        return f"(batch, channels, {frames}height, width)"

    def _check(self, x: object, what: str, does: str, channels: int | None) -> None:
        fits = isinstance(x, Tensor) and x.ndim == self.ndim and x.numel()
        if fits and isinstance(x, Tensor) and channels in (None, x.shape[1]):
            return
        found = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"that is {x!r}"
        if isinstance(x, Tensor) and not x.numel():
            found += ", which is empty"
        msg = f"a {what} {found}; this autoencoder {does} {self._sides}"
        if channels is not None:
            msg += f" with {channels} channels"
        raise ParallelConfigError(msg)


def config_of(vae: nn.Module) -> Any:
    """The configuration of an autoencoder of diffusers; an empty one of others."""
    return getattr(vae, "config", {})


def dtype_of(vae: nn.Module) -> torch.dtype:
    """What an autoencoder computes in, which may store its weights in less (layerwise casting)."""
    found = getattr(vae, "dtype", None)  # of diffusers' models, which know of such hooks
    return found if isinstance(found, torch.dtype) else next(vae.parameters()).dtype


def extra_arguments(vae: Any, z: Tensor) -> dict[str, Any]:
    """What ``decode`` needs beside the latent."""
    names = _decoder_parameters(vae)
    found: dict[str, Any] = {}
    if "num_frames" in names:
        found["num_frames"] = z.shape[0]
    if "temb" in names and getattr(config_of(vae), "timestep_conditioning", False):
        found["temb"] = torch.full((z.shape[0],), 0.05, dtype=z.dtype, device=z.device)
    return found


def _decoder_parameters(vae: Any) -> tuple[str, ...]:
    # Not those of ``decode``, which diffusers wraps without its signature.
    decoder = getattr(vae, "decoder", None)
    return () if decoder is None else tuple(inspect.signature(decoder.forward).parameters)


def random_latent(vae: nn.Module, channels: int, is_video: bool, side: int) -> Tensor:
    """A small latent, the same on every rank."""
    device = next(vae.parameters()).device
    frames = (2,) if is_video else ()
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, channels, *frames, side, side, generator=generator)
    return latent.to(device, dtype_of(vae))


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """What is drawn in the block changes no random state of the process."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device.index or 0]):
        yield


@torch.no_grad()
def geometry_of(vae: Any) -> Geometry:
    """The geometry of an autoencoder, by its configuration and a tiny latent.

    Raises:
        ParallelConfigError: It does not tell its number of channels.
    """
    config = config_of(vae)
    found = [getattr(config, name) for name in _CHANNELS if hasattr(config, name)]
    if not found:
        msg = (
            f"{type(vae).__name__} has neither {' nor '.join(_CHANNELS)} in its config, so its "
            "latents are not known"
        )
        raise ParallelConfigError(msg)
    is_video = any(isinstance(module, nn.Conv3d) for module in vae.modules())
    is_video = is_video and "num_frames" not in _decoder_parameters(vae)  # else they are the batch
    convolutions = [m for m in vae.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    least = max(map(least_rows, convolutions), default=1)
    least = max(least, *map(rows_for_padding, vae.modules()))
    scale, decoded = _measured_least(vae, found[0], is_video)
    return Geometry(found[0], _sample_channels(config, decoded), is_video, scale, least)


def _sample_channels(config: Any, decoded: int) -> int | None:
    """Channels of what is encoded, by those of what is decoded.

    The configuration counts those of the network, which may be given patches of a sample, or more
    beside it: only whether its two numbers are the same says something of samples.
    """
    before, after = (getattr(config, name, None) for name in ("in_channels", "out_channels"))
    return decoded if None in (before, after) or before == after else None


def _measured_least(vae: Any, channels: int, is_video: bool) -> tuple[int, int]:
    """Rows and channels as `_measured`, by the smallest latent that can be decoded."""
    try:
        return _measured(vae, channels, is_video, 2)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        try:
            return _measured(vae, channels, is_video, 8)
        except Exception:
            raise error from None


def _measured(vae: Any, channels: int, is_video: bool, side: int) -> tuple[int, int]:
    """Rows of a sample for each row of a latent, and its channels."""
    latent = random_latent(vae, channels, is_video, side)
    with kept_random_state(latent.device):
        sample = sharded_tensor(vae.decode(latent, **extra_arguments(vae, latent)))
    return sample.shape[-2] // side, sample.shape[1]
