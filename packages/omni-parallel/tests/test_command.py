"""The command says what is wrong before a rank starts, and fails when pictures differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from omni_parallel.cli import commands
from omni_parallel.demo import demonstration
from omni_parallel.demo.generate import RankReport
from omni_parallel.demo.launch import RunResult
from omni_parallel.demo.limits import MAX_SIZE
from omni_parallel.demo.table import VISIBLE
from omni_parallel.v1 import ParallelConfig, strategies

pytest.importorskip("diffusers")


def run(*options: str) -> Result:
    return CliRunner().invoke(commands(), ["demo", *options])


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a rank is a mistake."""

    def start(*_: object) -> RunResult:
        pytest.fail("a rank was started")

    monkeypatch.setattr(demonstration, "launch", start)


@pytest.mark.usefixtures("no_ranks")
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--ranks", "0"], ["--ranks", "1<=x"]),
        (["--ranks", "two"], ["--ranks", "'two'"]),
        (["--layout", ""], ["an empty layout", "such as cfg=2,ulysses=2"]),
        (
            ["--layout", "tp=2"],
            ["unknown: tp", "legal: dp, cfg, ulysses, ring, pp, pipefusion, hsdp"],
        ),
        (["--layout", "cfg=two"], ["cfg=two is no number of ranks"]),
        (["--layout", "ring=0"], ["nearest: ring=1"]),
        (["--layout", "cfg=2,cfg=2"], ["cfg is given twice"]),
        (["--layout", "cfg=3"], ["has 2 guidance branches", "legal: 1 to 2"]),
        (["--layout", "pp=7"], ["has 6 blocks", "legal: 1 to 6"]),
        (["--layout", "pp=2,hsdp=2"], ["peers of pp, whose weights differ"]),
        (["--layout", "cfg=2,vae_patch=3"], ["nearest legal: cfg=2,vae_patch=2"]),
        (["--layout", "ring=65"], ["65 ranks", "nearest: ring=64"]),
        (["--layout", "cfg=2", "--ranks", "3"], ["cfg=2 cannot run on 3 ranks", "nearest legal"]),
        (
            ["--layout", "ring=3,ulysses=3", "--size", "32x64"],
            ["32 x 64 pixels are 8 tokens", "up to 8 ranks"],
        ),
        (["--layout", "pipefusion=2,pp=2"], ["both cut the model's blocks into stages"]),
        (
            ["--layout", "pipefusion=3", "--size", "32x16"],
            ["patches=3", "32 x 16 pixels are 2 tokens", "legal: 1 to 2"],
        ),
        (["--steps", "0"], ["--steps", "1<=x"]),
        (["--seed", "-1"], ["--seed"]),
        (["--size", "big"], ["'big' is no size", "192x128"]),
        (["--size", "130"], ["width 130", "multiples of 16", "nearest: 128 and 144"]),
        (["--size", "128x7"], ["height 7", "nearest: 16 and 32"]),
        (["--size", "4096"], ["width 4096", f"nearest: {MAX_SIZE}"]),
        (["--size", "0"], ["width 0", "nearest: 16"]),
        (
            ["--ranks", "26", "--size", "16"],
            ["16 x 16 pixels are 1 token", "legal: up to 1 rank"],
        ),
        (["--ranks", "9", "--size", "64x32"], ["are 8 tokens", "up to 8 ranks"]),
        (["--ranks", "64", "--size", "112x128"], ["are 56 tokens", "up to 56 ranks"]),
        (["--prompt", "a crimson blob"], ["crimson, blob", "it knows: ", "circle"]),
        (["--prompt", "a red circle " * 12], ["tokens, and the model reads", "shorten it"]),
        (["--out", "/no/such/folder/sheet.png"], ["--out", "/no/such/folder"]),
        (["--out", "."], ["--out", "directory"]),
        (["--out", "sheet.jpg"], ["--out", "no PNG file", "nearest: sheet.png"]),
    ],
)
def test_bad_input_is_refused_before_a_rank_starts(options: list[str], parts: list[str]) -> None:
    result = run(*options)
    assert result.exit_code == 2, result.output
    said = " ".join(result.output.split())
    for part in parts:
        assert part in said


@pytest.mark.usefixtures("no_ranks")
@pytest.mark.parametrize(
    ("layout", "package"),
    [
        ("ring=2", "omni-sp"),
        ("cfg=2", "omni-cfgp"),
        ("vae_patch=2", "omni-vae-patch"),
        ("hsdp=2", "omni-hsdp"),
        ("pp=2", "omni-pp"),
        ("pipefusion=2", "omni-pp"),
        ("cfg=1", None),
    ],
)
def test_a_strategy_that_is_not_installed_is_missed_before_a_rank_starts(
    monkeypatch: pytest.MonkeyPatch, layout: str, package: str | None
) -> None:
    monkeypatch.setattr(strategies, "entry_points", lambda group: ())
    result = run("--layout", layout, "--prompt", "a crimson blob")
    assert result.exit_code == 2, result.output
    said = " ".join(result.output.split())
    if package is None:
        assert "crimson" in said, "one process needs no strategy"
    else:
        assert f"is not installed (installed: none); try: pip install {package}" in said


def fake_launch(error: float) -> object:
    """A launcher whose ranks draw noise, the parallel ones with an error on the last rank."""

    def launch(
        request: object, config: ParallelConfig, ranks: int, on_step: object, device: str | None
    ) -> RunResult:
        assert device == "cpu"
        picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        pictures = [picture.clone() for _ in range(ranks)]
        if ranks > 1:
            pictures[-1][0, 1, 2, 3] += error
        reports = [
            RankReport(rank, 0.5 / ranks, 3e6, 10**9, 10**7 // (config.hsdp * config.pp))
            for rank in range(ranks)
        ]
        return RunResult(config, tuple(reports), tuple(pictures))

    return launch


@pytest.mark.parametrize(("error", "status"), [(0.0, 0), (9e-5, 0), (2e-4, 1), (float("nan"), 1)])
def test_pictures_that_differ_on_any_rank_fail_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: float, status: int
) -> None:
    monkeypatch.setattr(demonstration, "launch", fake_launch(error))
    out = tmp_path / "sheet.png"
    result = run("--prompt", "a red circle", "--size", "32", "--ranks", "4", "--out", str(out))
    assert result.exit_code == status, result.output
    assert ("same pictures" if status == 0 else "DIFFERENT PICTURES") in result.output
    assert out.read_bytes().startswith(b"\x89PNG")
    assert str(out) in result.output.replace("\n", "")
    assert "4.00 x" in result.output
    assert all(len(line) <= 100 for line in result.output.splitlines() if "sheet.png" not in line)


@pytest.mark.parametrize(
    ("error", "status", "psnr"),
    [(0.0, 0, "inf"), (0.4, 0, "36.8"), (0.6, 1, "33.3"), (float("nan"), 1, "nan")],
)
def test_an_approximation_is_called_one_and_fails_the_command_where_it_is_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: float, status: int, psnr: str
) -> None:
    monkeypatch.setattr(demonstration, "launch", fake_launch(error))
    monkeypatch.setattr(demonstration, "load_strategy", lambda name: None)
    options = ["--layout", "pipefusion=2", "--out", str(tmp_path / "sheet.png")]
    result = run("--prompt", "a red circle", "--size", "32", *options)
    assert result.exit_code == status, result.output
    said = " ".join(result.output.split())
    verdict = "DIFFERENT PICTURES" if status else "similar pictures, not the same"
    assert f"{verdict}, for PipeFusion approximates: PSNR {psnr} dB in the picture" in said
    assert "same pictures" not in said.replace(verdict, "")
    assert f"largest difference {error:.1e}" in said


def test_a_difference_is_seen_where_omni_pp_says_so() -> None:
    quality = pytest.importorskip("omni_pp.pipefusion.quality")
    assert VISIBLE == quality.GOOD_ENOUGH


@pytest.mark.parametrize(
    ("options", "ranks", "names"),
    [
        (["--ranks", "3"], 3, ["ulysses=3"]),
        (["--layout", "ring=2", "--ranks", "2"], 2, ["ring=2"]),
        (["--layout", "cfg=2,ulysses=2"], 4, ["cfg=2", "ulysses=2"]),
        (["--layout", "vae_patch=2"], 2, ["vae_patch=2"]),
        (["--layout", "hsdp=2,ulysses=2"], 2, ["ulysses=2", "hsdp=2"]),
        (["--layout", "pp=2,cfg=2"], 4, ["cfg=2", "pp=2"]),
        (["--layout", "pipefusion=3,vae_patch=3"], 3, ["pipefusion=3", "vae_patch=3"]),
        (["--layout", "vae_patch=4,cfg=2,ring=2"], 4, ["cfg=2", "ring=2", "vae_patch=4"]),
        # 16 ranks and 8 tokens, which the 8 ranks of each branch share
        (
            ["--layout", "ulysses=4,ring=2,cfg=2", "--size", "64x32"],
            16,
            ["cfg=2", "ulysses=4", "ring=2"],
        ),
    ],
)
def test_the_layout_is_named_in_the_table_and_on_the_sheet(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    options: list[str],
    ranks: int,
    names: list[str],
) -> None:
    titles: list[str] = []
    monkeypatch.setattr(demonstration, "load_strategy", lambda name: None)
    monkeypatch.setattr(demonstration, "launch", fake_launch(0.0))
    monkeypatch.setattr(
        demonstration, "write_sheet", lambda out, prompts, runs: titles.extend(runs)
    )
    result = run("--prompt", "a red circle", *options, "--out", str(tmp_path / "a.png"))
    assert result.exit_code == 0, result.output
    assert titles == ["one process", f"{ranks} ranks ({', '.join(names)})"]
    assert all(name in result.output for name in names)
    assert f"{ranks}.00 x" in result.output
    table = [line for line in result.output.splitlines() if line[:1] in {"┃", "│"}]
    assert "sent/step" in table[0]
    assert all(len(line) <= 80 for line in table)


@pytest.mark.parametrize(
    ("layout", "said"), [("hsdp=4", True), ("pp=4", True), ("ulysses=4", False)]
)
def test_weights_of_each_rank_are_told_where_ranks_share_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layout: str, said: bool
) -> None:
    monkeypatch.setattr(demonstration, "load_strategy", lambda name: None)
    monkeypatch.setattr(demonstration, "launch", fake_launch(0.0))
    result = run("--prompt", "a red circle", "--layout", layout, "--out", str(tmp_path / "a.png"))
    assert result.exit_code == 0, result.output
    line = "weights: 10.00 MB on one process, 2.50 MB on each rank"
    assert (line in result.output) == said


def test_one_rank_is_the_single_process_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demonstration, "launch", fake_launch(0.0))
    result = run("--prompt", "a red circle", "--layout", "cfg=1", "--out", str(tmp_path / "a.png"))
    assert result.exit_code == 0, result.output
    assert "same pictures" not in result.output


def test_one_json_object_says_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demonstration, "launch", fake_launch(2e-4))
    out = tmp_path / "a.png"
    options = ["--prompt", "a red circle", "--size", "32", "--out", str(out), "--json"]
    result = run(*options)
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["command"], found["passed"], found["error"]) == ("demo", False, None)
    assert (found["layout"], found["ranks"], found["file"]) == ("ulysses=2", 2, str(out))
    assert [one["ranks"] for one in found["runs"]] == [1, 2]
    assert [one["seconds_per_step"] for one in found["runs"]] == [0.5, 0.25]
    assert found["largest"] == pytest.approx(2e-4, rel=1e-2)
    assert found["psnr"] > 60
    assert "DIFFERENT PICTURES" in result.stderr
    monkeypatch.setattr(demonstration, "launch", fake_launch(0.0))
    assert json.loads(run(*options).stdout)["psnr"] is None


def test_too_few_accelerators_are_left_for_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(demonstration, "launch", fake_launch(0.0))
    options = ["--prompt", "a red circle", "--size", "32", "--out", str(tmp_path / "a.png")]
    result = run(*options)
    assert result.exit_code == 0, result.output
    assert "2 ranks need as many accelerators, here is 1: using the CPU" in result.output
    result = run(*options, "--layout", "ring=2,ulysses=2")
    assert result.exit_code == 0, result.output
    assert "4 ranks need as many accelerators, here is 1: using the CPU" in result.output


def test_a_sheet_that_cannot_be_written_does_not_cost_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demonstration, "launch", fake_launch(0.0))
    monkeypatch.setattr(demonstration, "write_sheet", full)
    result = run("--prompt", "a red circle", "--size", "32", "--out", str(tmp_path / "a.png"))
    assert result.exit_code == 1
    assert "2.00 x" in result.output
    assert "No space left on device" in result.output
    assert "Traceback" not in result.output
