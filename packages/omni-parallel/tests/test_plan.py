"""``omni-parallel plan``: what it says, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("diffusers")

from omni_parallel.demo.pipeline import MODEL
from omni_parallel.plan.command import plan
from omni_parallel.plan.gpu_types import GPU_TYPES, gpu_type
from omni_parallel.plan.machine import Machine
from omni_parallel.plan.report import SHOWN

USUAL = ["--gpu", "h100-sxm", "--width", "128", "--height", "128"]


def invoke(*options: str, model: str | Path = MODEL) -> Any:
    return CliRunner().invoke(plan, [str(model), *USUAL, *options])


def planned(*options: str, model: str | Path = MODEL) -> dict[str, Any]:
    result = invoke("--json", *options, model=model)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def copied(folder: Path) -> Path:
    """A copy of the configuration of the model, without its weights."""
    for path in MODEL.rglob("*.json"):
        if "safetensors" not in path.name:
            copy = folder / path.relative_to(MODEL)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return folder


def test_the_object_has_every_layout_and_the_assumptions() -> None:
    found = planned(
        "--gpus", "4", "--all", "--guidance", "--steps", "7", "--link-efficiency", "0.5"
    )
    layouts = found["layouts"]
    assert found["request"] == {
        "width": 128,
        "height": 128,
        "frames": 1,
        "steps": 7,
        "branches": 2,
        "text_tokens": 24,
    }
    assert found["legal_layouts"] == len(layouts) == len({one["layout"] for one in layouts})
    assert [one["layout"] for one in layouts if one["auto"]] == ["cfg=2,ulysses=2,vae_patch=4"]
    times = [one["total_seconds"] for one in layouts]
    assert times == sorted(times)
    assert all(one["bytes_per_step"] == sum(one["bytes_per_step_by"].values()) for one in layouts)
    assert {one["exact"] for one in layouts} == {True, False}
    assert found["machine"]["gpu"]["name"] == "h100-sxm"
    assert found["machine"]["link_efficiency"] == 0.5
    assert found["machine"]["decode_efficiency"] == Machine.decode_efficiency
    assert any("compute = FLOPs" in text for text in found["assumptions"])


def test_the_table_fits_a_terminal_and_marks_what_auto_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    result = invoke("--gpus", "8", "--guidance")
    assert result.exit_code == 0, result.output
    lines = [line.rstrip() for line in result.output.splitlines()]
    head = next(i for i, line in enumerate(lines) if "MB/step" in line)
    table = lines[head : lines.index("", head)]
    assert len(table) > SHOWN
    assert max(map(len, table)) <= 100
    assert sum("auto" in line for line in table) == 1
    assert "vae_patch=8 beside every layout" in result.output
    assert "more of" in result.output


def test_a_slower_link_costs_time_and_more_memory_fits_more() -> None:
    fast = planned("--gpus", "2", "--all", "--no-guidance")
    slow = planned("--gpus", "2", "--all", "--no-guidance", "--link", "1")
    step = {one["layout"]: one["step_seconds"] for one in fast["layouts"]}
    for one in slow["layouts"]:
        assert one["step_seconds"] > step[one["layout"]]
    none = planned("--gpus", "2", "--all", "--memory", "0.001")
    assert not any(one["fits"] for one in none["layouts"])
    assert all(one["fits"] for one in fast["layouts"])


def test_hosts_that_a_group_spans_have_its_bytes_on_their_network() -> None:
    one, two = (planned("--gpus", "2", "--all", "--nodes", n)["layouts"] for n in "12")
    alone = {row["layout"]: row["link_seconds"] for row in one}
    for row in two:
        assert row["link_seconds"] == pytest.approx(alone[row["layout"]] * 450 / 50)


def test_a_transformer_alone() -> None:
    found = planned("--gpus", "2", model=MODEL / "transformer")
    assert found["model"]["flops_decode"] is None
    assert any("there is no autoencoder" in text for text in found["assumptions"])
    assert all("vae_patch" not in one["layout"] for one in found["layouts"])


def test_one_accelerator() -> None:
    (only,) = planned("--gpus", "1")["layouts"]
    assert only["layout"] == "single"
    assert only["bytes_per_step"] == only["bytes_decode"] == 0
    assert only["speedup"] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpus", "2", "--gpu", "tpu"], "--gpu tpu: not known; known: h100-sxm, h100-pcie"),
        (["--gpus", "4", "--nodes", "3"], "not as many on each; legal: 1, 2, 4"),
        (["--gpus", "0"], "0 is not in the range"),
        (["--gpus", "2", "--efficiency", "2"], "2.0 is not in the range"),
        (["--gpus", "2", "--width", "8"], "cannot be called for 8 x 128 pixels"),
    ],
)
def test_what_cannot_be_is_refused(options: list[str], said: str) -> None:
    result = invoke(*options)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


def test_a_model_that_is_none(tmp_path: Path) -> None:
    result = invoke("--gpus", "2", model=tmp_path)
    assert result.exit_code == 2
    assert "has no model_index.json" in " ".join(result.output.split())
    result = invoke("--gpus", "2", model="nobody/has-this")
    assert result.exit_code == 2
    assert "nobody/has-this is neither a folder here nor a model" in " ".join(result.output.split())
    (tmp_path / "config.json").write_text('{"_class_name": "SomeTransformer"}')
    result = invoke("--gpus", "2", model=tmp_path)
    assert result.exit_code == 2
    assert "SomeTransformer: it is not known how it is called" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("content", "said"), [("{", "cannot read"), ("[1]", "holds a list")], ids=["broken", "a list"]
)
@pytest.mark.parametrize("name", ["model_index.json", "tokenizer_2/tokenizer_config.json"])
def test_a_file_that_is_no_table_is_named(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    copy = copied(tmp_path)
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text(content)
    result = invoke("--gpus", "2", model=copy)
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert name in "".join(result.output.split())


def test_names_of_accelerators_in_any_case() -> None:
    assert gpu_type("H100 SXM") is gpu_type("h100_sxm") is GPU_TYPES[0]


def test_no_weight_is_read(tmp_path: Path) -> None:
    """A copy of the configuration alone is enough, in a process that may not open weights."""
    copied(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    command = "from omni_parallel.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "plan", str(tmp_path), "--gpus", "2", *USUAL, "--json"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["layouts"]
