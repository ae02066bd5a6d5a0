"""The README's examples run as they stand, but for the model, the prompt and the size."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from stock_pipelines import CASES

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

README = Path(__file__).parents[1] / "README.md"
SMALL = {
    '"path/to/flux"': repr(str(files("omni_parallel") / "demo" / "model")),
    '"a red fox in the snow"': '"a red circle", height=64, width=64, num_inference_steps=2',
}


def example(index: int, changes: dict[str, str]) -> str:
    """Code of the README, with changes that are each made once."""
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[index]
    for shown, other in changes.items():
        assert code.count(shown) == 1, shown
        code = code.replace(shown, other)
    return code


def torchrun(folder: Path, ranks: int, code: str) -> None:
    (folder / "script.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*command, f"--nproc-per-node={ranks}", "script.py"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize(("index", "ranks"), [(0, 4), (1, 2)])
def test_the_examples_of_the_readme_run(tmp_path: Path, index: int, ranks: int) -> None:
    torchrun(tmp_path, ranks, example(index, SMALL))
    assert (tmp_path / "fox.png").read_bytes().startswith(b"\x89PNG")


def image_vae(channels: int) -> Any:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        shift_factor=0.1,
    )


def video_vae(cls: Any, channels: int) -> Any:
    vae = cls(
        base_dim=8,
        z_dim=channels,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )
    with torch.no_grad():
        for parameter in vae.decoder.conv_out.parameters():
            parameter.mul_(0.3)  # below the clamp, which would hide differences
    return vae


PIPELINES: dict[str, Any] = {
    "Flux": lambda: image_vae(2),
    "Qwen-Image": lambda: video_vae(diffusers.AutoencoderKLQwenImage, 2),
    "Wan": lambda: video_vae(diffusers.AutoencoderKLWan, 4),
    "Stable Diffusion 3": lambda: image_vae(4),
}


@torch.no_grad()
def save_and_draw(name: str, folder: Path) -> tuple[str, str, np.ndarray]:
    """Save a small pipeline; returns its class, what it lacks, and what one process makes."""
    case = CASES[name]
    torch.manual_seed(0)
    saved = case.build()
    saved.register_modules(vae=PIPELINES[name]().eval())
    saved.save_pretrained(folder)
    cls, lacks = type(saved), [key for key, one in saved.components.items() if one is None]
    pipeline = cls.from_pretrained(folder, **dict.fromkeys(lacks))  # with the VAE's scale factors
    pipeline.set_progress_bar_config(disable=True)
    given = case.arguments(pipeline) | {"output_type": "np"}
    given.pop("generator")
    torch.save(given, folder / "arguments.pt")
    result = pipeline(**given, generator=torch.Generator().manual_seed(0))
    drawn = (result.frames if name == "Wan" else result.images)[0]
    return cls.__name__, ", ".join(f"{key}=None" for key in lacks), drawn


def test_the_first_example_makes_what_one_process_makes(tmp_path: Path) -> None:
    expected, code = {}, ""
    for name in PIPELINES:
        cls, lacks, expected[name] = save_and_draw(name, tmp_path / name)
        changes = {
            "from diffusers import FluxPipeline": f"from diffusers import {cls}",
            "FluxPipeline.from": f"{cls}.from",
            '"path/to/flux"': f"{name!r}, {lacks}",
            "torch.bfloat16": "torch.float32",
            '"a red fox in the snow"': f"**torch.load({f'{name}/arguments.pt'!r})",
            ").images[0]": ").frames[0]" if name == "Wan" else ").images[0]",
            'image.save("fox.png")': f'__import__("numpy").save({f"{name}.npy"!r}, image)',
        }
        code += example(0, changes)
    torchrun(tmp_path, 4, code)
    for name, alone in expected.items():
        found = np.load(tmp_path / f"{name}.npy")
        assert found.shape == alone.shape
        assert alone.std() > 0.01, f"{name} is of one colour, so nothing was seen"
        assert float(np.abs(found - alone).max()) <= 1e-5, name
