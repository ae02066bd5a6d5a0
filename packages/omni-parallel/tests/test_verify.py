"""``omni-parallel verify``: what one process makes beside what a layout makes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("diffusers")

from omni_parallel.demo.pipeline import MODEL
from omni_parallel.known_pipeline import KnownPipeline
from omni_parallel.pipeline_request import PipelineRequest
from omni_parallel.v1 import ParallelConfig
from omni_parallel.verify import command, verification
from omni_parallel.verify.rank import VerifiedRank
from omni_parallel.verify.report import Verified

RANK = VerifiedRank(0, 2.0, 10**9, 10**7)
REQUEST = PipelineRequest(model=str(MODEL))


def invoke(*options: str) -> Any:
    return CliRunner().invoke(command.verify, [str(MODEL), "--size", "64", *options])


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    ("layout", "ranks"), [("cfg=2,vae_patch=2", 2), ("auto", 2), ("ulysses=2,hsdp=2", 2)]
)
def test_a_layout_makes_what_one_process_makes(layout: str, ranks: int) -> None:
    result = invoke("--layout", layout, "--steps", "2", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["passed"]
    assert 0 < found["largest"] <= 1e-4
    assert (found["command"], found["error"]) == ("verify", None)
    assert found["ranks"] == len(found["measured"]) == ranks
    assert all(rank["seconds"] > 0 for rank in found["measured"])
    shared = found["measured"][0]["weight_bytes"] < found["single"]["weight_bytes"]
    assert shared == ("hsdp" in layout)
    assert found["torch"] == torch.__version__
    assert found["packages"]["omni-sp"] == "0.1.0"


def test_an_approximation_says_how_far_it_is() -> None:
    result = invoke("--layout", "pipefusion=2", "--steps", "4")
    assert result.exit_code == 0, result.output
    assert "pipefusion=2 approximates: PSNR " in result.output
    assert max(map(len, result.output.splitlines())) <= 100


def test_another_result_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = noise(1, 3, 8, 8)

    def made(request: PipelineRequest, config: ParallelConfig, ranks: int) -> Any:
        wrong = [right.clone() for _ in range(ranks)]
        if ranks > 1:
            wrong[1][0, 1, 2, 3] += 0.01
        return [(RANK, found) for found in wrong]

    monkeypatch.setattr(verification, "_run", made)
    result = invoke("--layout", "ulysses=2")
    assert result.exit_code == 1
    assert "ANOTHER RESULT: largest difference 1.0e-02, tolerance 0.0001" in result.output


def test_what_is_compared() -> None:
    right = noise(1, 3, 8, 8)
    slow = VerifiedRank(1, 4.0, 2 * 10**9, 10**7)
    both = [(RANK, right.clone()), (slow, right.clone())]
    same = Verified.of(REQUEST, ("ulysses=2", True), (RANK, right), both)
    assert same.identical
    assert same.passed
    assert math.isinf(same.psnr)
    assert same.to_dict()["psnr"] is None
    assert same.speed_up == 0.5
    broken = right.clone()
    broken[0, 0, 0, 0] = math.nan
    found = Verified.of(REQUEST, ("ulysses=2", True), (RANK, right), [both[0], (slow, broken)])
    assert not found.passed
    assert not found.identical
    assert found.psnr == -math.inf
    assert found.to_dict()["largest"] is None
    off = right + 0.1
    found = Verified.of(REQUEST, ("pipefusion=2", False), (RANK, right), [(RANK, off)])
    assert found.passed
    assert found.psnr == pytest.approx(20, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layout", "ulysses=5"], "has 4 heads"),
        (["--layout", "pp=7"], "has 6 blocks"),
        (["--layout", "warp=2"], "unknown: warp"),
        (["--layout", "ulysses=4,ring=5", "--size", "64"], "are 16 tokens"),
        (["--size", "big"], "--size big: no size"),
        (["--layout", "cfg=2", "--nproc", "3"], "does not divide the world of 3 ranks"),
    ],
)
def test_what_cannot_be_is_refused_before_a_rank_starts(options: list[str], said: str) -> None:
    result = invoke(*options)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    result = CliRunner().invoke(command.verify, [str(tmp_path)])
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert "has no model_index.json; legal: a folder that a diffusers pipeline was saved to" in said
    assert "or a model" not in said
    result = CliRunner().invoke(command.verify, [str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "does not exist" in result.output


def test_a_bare_model_is_refused_and_its_pipeline_named() -> None:
    result = CliRunner().invoke(command.verify, [str(MODEL / "transformer")])
    assert result.exit_code == 2
    said = "".join(result.output.split())
    assert "isabaremodel,notapipeline" in said
    assert f"nearest:{MODEL.absolute()}" in said


def test_an_argument_that_the_pipeline_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_run", None)  # no rank starts
    result = invoke("--layout", "ulysses=2", "--frames", "5")
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert "FluxPipeline takes no num_frames; leave out: --frames" in said


def test_a_layout_whose_guidance_the_pipeline_does_not_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Pipeline:
        def __call__(
            self,
            prompt: str,
            num_inference_steps: int,
            width: int,
            height: int,
            output_type: str,
            return_dict: bool,
        ) -> None:
            """Take no guidance."""

    monkeypatch.setattr(KnownPipeline, "kind", Pipeline)
    monkeypatch.setattr(verification, "_run", None)
    result = invoke("--layout", "cfg=2")
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert said.endswith("takes no negative_prompt, guidance_scale; leave out: --layout cfg=2")
