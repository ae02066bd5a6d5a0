"""The benchmark of autoencoders counts memory and halos right, and runs on ranks."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import nn

from bench import vae, vae_case
from bench.harness import Harness
from bench.report import WIDTH, show
from bench.results import Report
from bench.vae_case import DecodeCase
from bench.vae_contestants import DISTVAE, vae_contestants
from bench.vae_counts import LiveBytes
from bench.vae_models import AUTOENCODERS, build_vae, latent_of, tile
from bench.vae_report import decode_parts
from bench.vae_results import FLOOR, DecodeMeasured, DecodeResult, DecodeTraffic, Sent
from omni_parallel.plan.convolutions import Convolved, convolutions_of, halo_bytes

# diffusers' own.
of_diffusers = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
FLOAT = 4
TINY = {"kl": DecodeCase("kl", 128, 128), "wan": DecodeCase("wan", 64, 96, frames=5)}


def tiny_latent(family: str) -> torch.Tensor:
    case = TINY[family]
    return latent_of(family, case.batch, case.frames, case.height, case.width)


def test_memory_is_the_most_that_is_alive_at_once():
    weight = torch.ones(1000)
    with LiveBytes() as live:
        first = weight + 1
        second = first * 2  # two
        del first
        second.mul_(3).view(10, 100).t()  # neither work in place nor a view is more
        weight.view(10, 100)  # nor a view of what was there before
        third = second + 1  # two again
        del second, third
        torch.empty(500)
    assert live.peak == 2 * 1000 * FLOAT
    assert live.wire == Sent(0, 0)


def test_a_rank_sends_the_rows_that_its_neighbours_kernels_reach():
    x = torch.zeros(2, 4, 6, 8)
    module = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 2, (5, 1), padding=(2, 0))
    )
    with convolutions_of(module) as calls:
        module(x)
    assert [call.reaches for call in calls] == [True, False, True]
    row, column = 2 * 4 * 8 * FLOAT, 2 * 4 * 6 * FLOAT
    assert halo_bytes(calls, -2, 2) == row + 2 * row // 2  # the last one has half of the channels
    assert halo_bytes(calls, -1, 2) == column
    assert halo_bytes(calls, -1, 3) == 2 * column  # the rank in between
    module(x)
    assert len(calls) == 3


def test_an_even_kernel_reaches_further_to_one_side():
    (call,) = calls = [Convolved((4, 1), (10, 10))]
    assert call.reaches
    assert halo_bytes(calls, -2, 2) == 2 * 10
    assert halo_bytes(calls, -2, 4) == 3 * 10


@of_diffusers
@torch.no_grad()
@pytest.mark.parametrize("family", AUTOENCODERS)
def test_tiles_are_two_on_each_side(family: str):
    stock, latent = build_vae(family), tiny_latent(family)
    calls: list[int] = []
    stock.decoder.register_forward_hook(lambda *_: calls.append(1))
    whole = stock.decode(latent, return_dict=False)[0]
    once = len(calls)
    tile(stock, family, latent)
    tiled = stock.decode(latent, return_dict=False)[0]
    assert len(calls) == once + 4 * once
    assert tiled.shape == whole.shape
    assert not torch.allclose(tiled, whole, atol=1e-2)


@of_diffusers
@torch.no_grad()
@pytest.mark.parametrize("family", AUTOENCODERS)
def test_a_latent_has_the_shape_of_its_sample_and_nothing_is_cut_off(family: str):
    case = TINY[family]
    sample = build_vae(family).decode(tiny_latent(family), return_dict=False)[0]
    assert sample.shape[0] == case.batch
    assert tuple(sample.shape[-2:]) == (case.height, case.width)
    if family == "wan":
        assert sample.shape[2] == case.frames
        assert sample.abs().max() < 1


def test_rows_take_the_same_kernels_for_parts_as_for_the_whole():
    known = {**vae_case.CASES, **vae_case.LONG_CASES}
    assert all(name == case.name for name, case in known.items())
    assert {"kl-256", "kl-1024", "wan-480x5"} == set(vae_case.CASES)
    assert set(vae.QUICK_ROWS) < set(vae_case.CASES)
    for case in known.values():
        half = latent_of(case.family, case.batch, case.frames, case.height // 2, case.width)
        assert case.batch > 1 or half.numel() > 20480


def test_the_list_names_every_row():
    result = CliRunner().invoke(vae.main, ["--list"])
    assert result.exit_code == 0
    found = [line.split()[0] for line in result.output.splitlines()]
    assert found == [*vae_case.CASES, *vae_case.LONG_CASES]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "kl-257"], "'kl-257' is unknown; legal: kl-256, kl-1024, wan-480x5"),
        (
            ["--modes", "rows"],
            "'rows'; legal: height, height+keys, tiles, width, width+keys, each also with floor:, "
            "diffusers:, omni-vae-patch: or DistVAE: in front",
        ),
        (["--rounds", "0"], "0 is not in the range"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(arguments: list[str], message: str):
    result = CliRunner().invoke(vae.main, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def result_of(case: DecodeCase) -> DecodeResult:
    """Made up, with large numbers; the floor takes half of what others do."""
    seconds, half = (123.4567, 124.4567), (61.72835, 62.22835)
    sent = Sent(123_456_789, 1_234)
    traffic = DecodeTraffic(sent, sent.bytes + 1, sent, sent, sent)
    measured = tuple(
        DecodeMeasured(
            c.name,
            c.side,
            half if c.side == FLOOR else seconds,
            1.2e-7,
            mode=c.mode,
            memory=1_200_000_000,
            psnr=123.4,
            sent=traffic if c.counts_traffic else None,
            wire=None if c.alone else Sent(0, 0) if c.side == FLOOR else sent,
        )
        for c in vae_contestants()
    )
    return DecodeResult(
        case.title, 2, DISTVAE, seconds, seconds, measured, memory=2_400_000_000, reaching=25
    )


def test_the_report_fits_a_hundred_columns():
    known = (*vae_case.CASES.values(), *vae_case.LONG_CASES.values())
    report = Report("decoding", [replace(result_of(case), remark=case.remark) for case in known])
    console = Console(width=WIDTH)
    with console.capture() as capture:
        show(report, console, decode_parts)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "…" not in capture.get()
    text = " ".join(" ".join(lines).split())
    for case in known:
        assert f"{case.title} on 2 ranks, 2 rounds; this machine allows 2.00 ×" in text
    for contestant in vae_contestants():
        tables = 1 if contestant.alone or contestant.side == FLOOR else 2
        assert text.count(f"│ {contestant.name} ") == tables * len(known)
    for part in ("0.50 ×", "50%", "123 dB", "2400 MB", "25 convolutions", "123 in 1234 ≠"):
        assert part in text
    assert "the formula gives 123,456,790" in text


def test_the_floor_is_that_of_the_same_side_or_else_the_faster_one():
    case = result_of(vae_case.CASES["kl-256"])
    slow = tuple(
        replace(m, seconds=(100.0, 100.0)) if m.name == "floor height" else m for m in case.measured
    )
    case = replace(case, measured=slow)
    shares = {m.name: case.share_of_floor(m) for m in case.measured}
    assert shares["floor height"] is None
    for name, least, most in (
        ("omni-vae-patch width", 0.5, 0.5),
        ("omni-vae-patch height", 0.8, 0.82),
        ("omni-vae-patch tiles", 0.5, 0.5),
    ):
        share = shares[name]
        assert share is not None
        assert least <= share.median <= most
    (height,) = (m for m in case.measured if m.name == "omni-vae-patch height")
    assert case.ratios(height)["share_of_floor"] == shares["omni-vae-patch height"]
    alone = replace(case, measured=case.measured[4:])
    assert alone.share_of_floor(alone.measured[0]) is None


@pytest.mark.slow
@pytest.mark.parametrize("family", AUTOENCODERS)
def test_two_ranks_race_and_send_what_the_formula_says(family: str):
    with Harness(lambda _: None) as harness:
        result = harness.run(vae_case.race_case, 2, TINY[family], vae_contestants(), 2)
    found = {m.name: m for m in result.measured if isinstance(m, DecodeMeasured)}
    assert list(found) == [c.name for c in vae_contestants()]
    for name, measured in found.items():
        if measured.side == DISTVAE and importlib.util.find_spec("distvae") is None:
            assert not measured.seconds
            assert "pip install --no-deps distvae" in (measured.problem or "")
            continue
        assert measured.problem is None
        assert len(measured.seconds) == len(result.single) == 2
        assert measured.memory is not None
        assert measured.memory < result.memory
        assert measured.error is not None
        exact = measured.side not in (FLOOR, "diffusers") and measured.mode != "tiles"
        assert (measured.error < 1e-4) == exact, name
    own, tiles = found["diffusers tiles"], found["omni-vae-patch tiles"]
    assert own.error == tiles.error
    assert own.psnr == tiles.psnr
    for mode in ("height", "width"):
        exact = found[f"omni-vae-patch {mode}"]
        assert exact.psnr is None or exact.psnr > 100
        assert exact.sent is not None
        sent = exact.sent
        assert sent.halos == Sent(sent.formula, result.reaching)
        assert (sent.norms.calls > 0) == (family == "kl")
        assert sent.attention.calls > 0
        parts = (sent.halos, sent.norms, sent.attention, sent.result)
        assert exact.wire is not None
        assert exact.wire.bytes == sum(part.bytes for part in parts)
        assert found[f"floor {mode}"].wire == Sent(0, 0)


@pytest.mark.slow
def test_the_command_writes_json_and_a_picture(tmp_path: Path):
    path, picture = tmp_path / "report.json", tmp_path / "report.png"
    options = ["--quick", "--rounds", "1", "--modes", "floor:width,omni-vae-patch:width"]
    result = CliRunner().invoke(vae.main, [*options, "--json", str(path), "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    (case,) = json.loads(path.read_text())["cases"]
    floor, exact = case["measured"]
    assert floor["share_of_floor"] is None
    assert exact["share_of_floor"]["median"] > 0
    assert exact["sent"]["halos"]["bytes"] == exact["sent"]["formula"]
    assert picture.read_bytes().startswith(b"\x89PNG")
