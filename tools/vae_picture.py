"""Draw docs/images/vae-seams.png: a picture decoded on two ranks, by tiles, and what each is off.

The demonstration's model makes a picture twice as large as it was trained on, and its autoencoder
decodes the latent of that: whole on one process, which is what the others are compared with, on
two ranks with `omni-vae-patch` in its exact mode, and by its own tiles.

    python tools/vae_picture.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from omni_parallel.demo.generate import generate
from omni_parallel.demo.pipeline import load_pipeline
from omni_parallel.demo.request import DemoRequest
from omni_parallel_state import ParallelLayout, ParallelState
from omni_vae_patch import VaeParallelConfig, parallelize_vae
from omni_vae_patch.tiles import enabled_tiling
from rank_harness import RankPool

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OUT = Path(__file__).parents[1] / "docs" / "images" / "vae-seams.png"
PIXELS = 256
TILE = 8
"""Sides of a tile, in positions of the latent; one is 8 pixels."""
AMPLIFIED = 20
REQUEST = DemoRequest(
    prompts=("a purple star right of an orange circle",), width=PIXELS, height=PIXELS
)


@dataclass(frozen=True)
class Decoded:
    """A decoded picture beside the one that a single process decodes at once."""

    name: str
    picture: Tensor
    """``(3, height, width)`` in [0, 1]."""
    whole: Tensor

    @property
    def difference(self) -> Tensor:
        """Of each pixel, the largest of its colours."""
        return (self.picture - self.whole).abs().amax(0)

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB; infinite for equal pictures."""
        error = (self.picture - self.whole).double().square().mean().item()
        return -10 * log10(error) if error else float("inf")


def decoder() -> Any:
    """The autoencoder of the demonstration's model."""
    return load_pipeline(torch.device("cpu")).vae


@torch.no_grad()
def latent_of_a_picture() -> Tensor:
    """The latent of what the demonstration's model draws."""
    pipeline = load_pipeline(torch.device("cpu"))
    picture = generate(pipeline, REQUEST)
    latent: Tensor = pipeline.vae.encode(picture * 2 - 1).latent_dist.mode()
    return latent


@torch.no_grad()
def decoded(vae: Any, latent: Tensor) -> Tensor:
    """The picture of a latent, in [0, 1]."""
    sample: Tensor = vae.decode(latent).sample
    return (sample[0] / 2 + 0.5).clamp(0, 1)


def decoded_on_this_rank(latent: Tensor) -> Tensor:
    """The picture, by this rank together with the others."""
    vae = decoder()
    state = ParallelState(ParallelLayout(vae=dist.get_world_size()))
    with parallelize_vae(vae, VaeParallelConfig("exact"), state=state):
        return decoded(vae, latent)


def decoded_by_tiles(latent: Tensor) -> Tensor:
    """The picture, by the autoencoder's own tiling."""
    vae = decoder()
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    tiles = {"tile_latent_min_size": TILE, "tile_sample_min_size": TILE * scale}
    with enabled_tiling(vae, **tiles):
        return decoded(vae, latent)


def draw(results: list[Decoded], out: Path) -> None:
    """Write each picture, and beside it how much it is off."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 2 * len(results))
    for index, result in enumerate(results):
        _show(axes[2 * index], result.picture.movedim(0, -1), result.name)
        largest = f"largest {result.difference.max():.1e}, PSNR {result.psnr:.0f} dB"
        shown = (result.difference * AMPLIFIED).clamp(0, 1)
        _show(axes[2 * index + 1], shown, f"difference × {AMPLIFIED}\n{largest}")
    figure.savefig(out, dpi=100)


def _show(axes: Axes, values: Tensor, title: str) -> None:
    axes.imshow(values.numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.axis("off")


def main() -> None:
    """Decode in three ways, and draw."""
    parser = argparse.ArgumentParser(description="Draw the picture of the guide to autoencoders.")
    parser.add_argument("--out", type=Path, default=OUT, help="PNG file (default: %(default)s)")
    out = parser.parse_args().out
    latent = latent_of_a_picture()
    whole = decoded(decoder(), latent)
    with RankPool() as ranks:
        exact = ranks.run(decoded_on_this_rank, latent)[0]
    tiles = f"tiles of {TILE} × {TILE} latent positions"
    results = [
        Decoded("exact, on two ranks\n", exact, whole),
        Decoded(f"the autoencoder's own tiling,\n{tiles}", decoded_by_tiles(latent), whole),
    ]
    draw(results, out)
    for result in results:
        print(  # noqa: T201
            f"{' '.join(result.name.split())}: largest difference {result.difference.max():.1e}, "
            f"PSNR {result.psnr:.1f} dB"
        )


if __name__ == "__main__":
    main()
