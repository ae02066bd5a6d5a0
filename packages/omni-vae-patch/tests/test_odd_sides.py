"""Encoding of samples of which a side is no multiple of the compression."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from small_vaes import error, everyone, random
from stock_autoencoders import CASES, encoded

from omni_vae_patch import VaeParallelConfig, parallelize_vae

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:In CPU autocast:UserWarning"
)

UNVERIFIED = VaeParallelConfig("exact", verify=False)


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@torch.no_grad()
def odd(dim: Any, result: Any) -> tuple[list[float | None], list[str], list[int]]:
    """Encoding of samples of which neither side can be divided; and how much is encoded."""
    vae: Any = CASES["kl"].build()
    log, samples = _Log(), [random(1, 3, 30, 22), random(1, 3, 29, 23)]
    alone = [vae.encode(x).latent_dist.parameters for x in samples]
    logging.getLogger("omni_vae_patch").addHandler(log)
    rows: list[int] = []
    config = VaeParallelConfig("exact", dim, result, verify=False)
    found: list[float | None] = []
    with parallelize_vae(vae, config, group=everyone()):
        hook = vae.encoder.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[2]))
        for x, expected in zip(samples, alone, strict=True):
            output = vae.encode(x)
            off = None if output is None else error(output.latent_dist.parameters, expected)
            found.append(off)
        hook.remove()
    logging.getLogger("omni_vae_patch").removeHandler(log)
    return found, log.lines, rows


def test_a_sample_without_a_side_that_divides_is_encoded_whole_and_said_once(ranks):
    for found, lines, rows in ranks.run(odd, "auto", "all"):
        assert max(found) <= 1e-5
        assert rows == [30, 29]
        (line,) = lines
        assert "a sample of 30 x 22, of which the height or width should be sharded" in line
        assert "no multiple of 4" in line


def test_a_sample_that_is_encoded_whole_is_so_by_those_alone_who_get_the_result(ranks):
    first, *others = ranks.run(odd, "height", "first", world_size=3)
    assert max(first[0]) <= 1e-5
    assert first[2] == [30, 29]
    for found, (line,), rows in others:
        assert found == [None, None]
        assert rows == []
        assert "of which the height should be sharded" in line


ODD = ["kl", "flux2", "tiny", "wan-2.1", "qwen-image", "hunyuan-video", "cogvideox", "magvit"]


@torch.no_grad()
def of_odd_sides(name: str) -> list[tuple[float, float]]:
    """Encoding of samples of which one side divides; the error, and how much a rank is given."""
    case = CASES[name]
    vae, whole, found = case.build(), case.sample(6, 5, 0), []
    rows, columns = 5 * case.scale + 1, 4 * case.scale + case.scale // 2 + 1
    samples = [whole[..., :-1, :], whole[..., :rows, :], whole[..., :-1], whole[..., :columns]]
    alone = [encoded(vae, x) for x in samples]
    shapes: list[torch.Size] = []
    with parallelize_vae(vae, UNVERIFIED, group=everyone()):
        vae.encoder.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
        for x, expected in zip(samples, alone, strict=True):
            shapes.clear()
            off = error(encoded(vae, x), expected)
            found.append((off, max(area(one) for one in shapes) / area(x.shape)))
    return found


def area(shape: torch.Size) -> int:
    return shape[-2] * shape[-1]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_sample_is_sharded_along_the_side_that_divides(ranks, name, world_size):
    """Five columns of latents on two ranks are three and two, and six rows are three and three."""
    for found in ranks.run(of_odd_sides, name, world_size=world_size):
        for off, share in found:
            assert off <= 1e-5
            assert share <= {2: 0.6, 3: 0.4}[world_size]
