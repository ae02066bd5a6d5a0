"""``omni-parallel generate``: the files of a layout are those of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("diffusers")
from PIL import Image

from omni_group_coordinator import ParallelConfigError
from omni_parallel.demo.pipeline import MODEL
from omni_parallel.generate import generation, output
from omni_parallel.generate.command import LAUNCHERS, generate
from omni_parallel.generate.output import check_format, check_output, save
from omni_parallel.v1 import strategies

CLI = "from omni_parallel.cli import main; main()"
USUAL = ["--size", "64", "--steps", "3", "--guidance", "3", "--negative-prompt", ""]
PROMPT = ["--prompt", "a red circle left of a blue square"]


def invoke(*options: str, model: str = str(MODEL)) -> Any:
    return CliRunner().invoke(generate, [model, *PROMPT, *USUAL, *options])


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as found:
        image = found.convert("RGB")
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).short()


def test_the_file_of_ranks_is_that_of_one_process(tmp_path: Path) -> None:
    alone, together = tmp_path / "alone.png", tmp_path / "together.png"
    assert invoke("--out", str(alone), "--nproc", "1").exit_code == 0
    result = invoke("--out", str(together), "--layout", "cfg=2,vae_patch=2", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["passed"]
    assert found["error"] is None
    assert (found["command"], found["ranks"], found["files"]) == ("generate", 2, [str(together)])
    assert (found["model"], found["layout"]) == (str(MODEL), "cfg=2,vae_patch=2")
    assert found["seconds"] > 0
    assert pixels(alone).shape == (64, 64, 3)
    assert pixels(alone).float().std() > 1
    assert (pixels(alone) - pixels(together)).abs().max() <= 1


def test_each_prompt_has_a_file(tmp_path: Path) -> None:
    more = ["--prompt", "a large cyan ring", "--nproc", "2", "--seed", "5"]
    result = invoke(*more, "--out", str(tmp_path / "a.webp"))
    assert result.exit_code == 0, result.output
    first, second = tmp_path / "a-0.webp", tmp_path / "a-1.webp"
    assert result.output.splitlines()[-2:] == [f"wrote {first}", f"wrote {second}"]
    assert (pixels(first) - pixels(second)).abs().max() > 50


def test_two_hosts_make_one_image(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ["--nnodes", "2", "--rdzv-endpoint", f"localhost:{port}", "--nproc", "1"]
    command = [sys.executable, "-c", CLI, "generate", str(MODEL), *PROMPT, *USUAL, *options]
    done: list[subprocess.CompletedProcess[str]] = []

    def host() -> None:
        out = ["--layout", "ulysses=2", "--out", str(tmp_path / "a.png")]
        done.append(
            subprocess.run(
                [*command, *out],
                capture_output=True,
                text=True,
                timeout=110,
                check=False,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        )

    hosts = [threading.Thread(target=host) for _ in range(2)]
    for one in hosts:
        one.start()
    for one in hosts:
        one.join()
    assert [one.returncode for one in done] == [0, 0], [one.stderr[-2000:] for one in done]
    assert sorted("wrote" in one.stdout for one in done) == [False, True]
    assert pixels(tmp_path / "a.png").shape == (64, 64, 3)


def test_files_of_videos(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(4)]
    (gif,) = save([frames], tmp_path / "a.gif")
    with Image.open(gif) as found:
        assert found.n_frames == 4
    images = save([frames], tmp_path / "a.png")
    assert images == [tmp_path / f"a-000{i}.png" for i in range(4)]
    assert all(path.is_file() for path in images)
    assert pixels(tmp_path / "a-0003.png")[0, 0, 0] == 180
    assert len(save([frames, frames], tmp_path / "b.gif")) == 2
    assert len({path for path in save([frames, frames], tmp_path / "c.png") if path.is_file()}) == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layout", "ulysses=5"], "has 4 heads"),
        (["--layout", "warp=2"], "unknown: warp"),
        (["--size", "big"], "--size big: no size"),
        (["--size", "0"], "--size 0: no size"),
        (["--size", "64x0"], "--size 64x0: no size"),
        (["--size", "-64"], "--size -64: no size"),
        (["--frames", "5"], "FluxPipeline takes no num_frames; leave out: --frames"),
        (["--out", "a.mp4"], "the pipeline makes images; legal: .png, .jpg"),
        (["--frames", "5", "--launcher", "ray"], "leave out: --frames"),
        (["--out", "none/a.png"], "is no folder that can be written to"),
        (["--out", "a.tiff"], "unknown format; legal: .png, .jpg"),
        (["--nnodes", "2"], "needs --rdzv-endpoint"),
        (["--nnodes", "2", "--launcher", "ray"], "leave --nnodes and --rdzv-endpoint out"),
        (["--launcher", "ray", "--layout", "ulysses=5"], "has 4 heads"),
        (["--launcher", "slurm"], "'slurm' is not one of 'torch', 'ray'"),
        (
            ["--nnodes", "2", "--rdzv-endpoint", "a:1", "--layout", "ring=3"],
            "3 ranks of the layout",
        ),
        (["--dtype", "int8"], "'int8' is not one of"),
    ],
)
def test_what_cannot_be_is_refused_before_a_rank_starts(
    monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.setattr(generation, "run_ranks", None)
    monkeypatch.setattr(generation, "ray_cluster", None)
    result = invoke(*options)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("empty", "has no model_index.json; legal: a folder"),
        ("nobody/has-this", "nobody/has-this is neither a folder here nor a model of the hub"),
        ("/none/of/these", "/none/of/these is neither a folder here nor a model of the hub"),
        (str(MODEL / "transformer"), "is a bare model, not a pipeline; legal: a folder"),
        (str(MODEL / "model_index.json"), "is no folder; legal: a folder"),
    ],
)
def test_a_model_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, said: str, launcher: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generation, "run_ranks", None)
    monkeypatch.setattr(generation, "ray_cluster", None)
    result = invoke("--layout", "ulysses=2", "--launcher", launcher, model=model)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


def test_a_class_that_diffusers_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "WarpPipeline"}')
    result = invoke("--nproc", "1", model=str(tmp_path))
    assert result.exit_code == 2
    assert "is a WarpPipeline, which diffusers" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("installed", "missing"),
    [((), True), (("imageio",), True), (("imageio", "imageio_ffmpeg"), False), (("cv2",), False)],
)
def test_what_writes_mp4_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], missing: bool
) -> None:
    monkeypatch.setattr(output, "find_spec", lambda name: name if name in installed else None)
    said = pytest.raises(ParallelConfigError, match="try: pip install imageio imageio-ffmpeg")
    with said if missing else nullcontext():
        check_format(tmp_path / "a.mp4", videos=True)


def test_a_size_that_the_pipeline_changes_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "run_ranks", lambda *args, **kwargs: {0: []})
    out = ["--nproc", "1", "--out", str(tmp_path / "a.png")]
    found = invoke(*out, "--size", "100x64")
    assert found.exit_code == 0
    assert "100x64 is no multiple of 16 pixels" in found.stderr
    assert "nearest: 96x64" in found.stderr
    assert "note" not in invoke(*out).output


@contextmanager
def nobody() -> Iterator[None]:
    """Root may write everywhere; it is somebody else within the block."""
    if os.geteuid():
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_folder_without_permission(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    inner = tmp_path / "inner" / "a.png"
    with nobody():
        for out in (tmp_path / "a.png", inner):
            with pytest.raises(ParallelConfigError, match="is no folder that can be written to"):
                check_output(out)
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("group", "version", "said"),
    [
        ((), "0.1.0", "'sp' is not installed (installed: none); try: pip install omni-sp"),
        (None, "0.2.0", "omni-sp 0.2.0 does not go with"),
    ],
)
def test_a_package_that_is_missing_or_of_another_line(
    monkeypatch: pytest.MonkeyPatch, group: tuple[()] | None, version: str, said: str
) -> None:
    if group is not None:
        monkeypatch.setattr(strategies, "entry_points", lambda group: ())
    else:
        named = SimpleNamespace(name="omni-sp", version=version)
        entry = EntryPoint("sp", "omni_sp.strategy:STRATEGY", strategies.STRATEGY_GROUP)
        vars(entry)["dist"] = named
        monkeypatch.setattr(strategies, "entry_points", lambda group: (entry,))
    result = invoke("--layout", "ulysses=2")
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.split())


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(ParallelConfigError, match="it is there, and no file"):
        check_output(tmp_path / "a.png")
