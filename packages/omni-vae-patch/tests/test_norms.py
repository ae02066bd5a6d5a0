"""A group norm on shards has the mean and the variance of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_vaes import error, everyone, on_shards, part_of, random
from torch import Tensor, nn

from omni_group_coordinator import split_sizes
from omni_vae_patch.spatial.norms import merged_moments, shard_group_norm
from omni_vae_patch.spatial.partition import HEIGHT, WIDTH, partition


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    mean=st.floats(-1e3, 1e3),
    apart=st.floats(-50, 50),
    seed=st.integers(0, 999),
)
def test_moments_of_parts_make_those_of_the_whole(counts, mean, apart, seed):
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(3, sum(counts), generator=generator, dtype=torch.float64) + mean
    parts = [part + i * apart for i, part in enumerate(whole.split(counts, 1))]
    whole = torch.cat(parts, 1)
    means = torch.stack([part.mean(1) for part in parts])
    squares = torch.stack([(part - part.mean(1, True)).square().sum(1) for part in parts])
    found = merged_moments(means, squares, counts)
    expected_variance, expected_mean = torch.var_mean(whole, 1, correction=0)
    torch.testing.assert_close(found[0], expected_mean, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(found[1], expected_variance, rtol=1e-8, atol=1e-9)


def test_nothing_is_lost_where_means_are_large_against_deviations():
    """In float32, where the mean of squares less the square of the mean would be noise."""
    values = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0)) * 0.1 + 1000
    parts = values.split([1000, 3096], 1)
    means = torch.stack([part.mean(1) for part in parts])
    squares = torch.stack([(part - part.mean(1, True)).square().sum(1) for part in parts])
    _, variance = merged_moments(means, squares, [1000, 3096])
    expected = values.double().var(correction=0).item()
    assert variance.item() == pytest.approx(expected, rel=1e-3)
    by_squares = values.square().mean().item() - values.mean().item() ** 2
    assert by_squares != pytest.approx(expected, rel=1e-1)


def ramp(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows from -10 to 10: shards of the height have means that are far apart."""
    return (random(2, 8, rows, 6) + torch.linspace(-10, 10, rows)[:, None]).to(dtype)


def norm(affine: bool = True, **more: Any) -> nn.GroupNorm:
    module = nn.GroupNorm(4, 8, affine=affine, **more)
    if affine:
        nn.init.normal_(module.weight, 1, 0.3, generator=torch.Generator().manual_seed(1))
        nn.init.normal_(module.bias, 0, 0.3, generator=torch.Generator().manual_seed(2))
    return module.requires_grad_(False)


def inputs() -> list[tuple[str, nn.GroupNorm, Tensor, int]]:
    video = random(2, 8, 3, 7, 6)
    return [
        ("ramp", norm(), ramp(11), HEIGHT),
        ("ramp across", norm(), ramp(11).mT.contiguous(), WIDTH),
        ("no weights", norm(affine=False), ramp(5), HEIGHT),
        ("large mean", norm(), ramp(9) * 0.05 + 100, HEIGHT),
        ("large eps", norm(eps=1.0), ramp(9), HEIGHT),
        ("video", norm(), video, HEIGHT),
        ("video across", norm(), video, WIDTH),
        ("fewer rows than ranks", norm(), ramp(2), HEIGHT),
        ("channels last", norm(), ramp(7).to(memory_format=torch.channels_last), HEIGHT),
    ]


@torch.no_grad()
def errors() -> dict[str, float]:
    """Of each case, in one run; forward is the class's own again afterwards."""
    group, found = everyone(), {}
    for name, module, x, dim in inputs():
        rows = partition(x.shape[dim], group.world_size, dim)
        expected = part_of(module(x), rows, group.rank_in_group, 1)
        got = on_shards(group, module, shard_group_norm, module, x, rows)
        found[name] = 0.0 if got is None else error(got, expected)
        assert "forward" not in vars(module)
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_norm_on_shards_is_that_of_the_whole(ranks, world_size):
    for found in ranks.run(errors, world_size=world_size):
        # A mean of 100 with deviations of 0.3 costs digits on one rank too.
        assert max(v for k, v in found.items() if k != "large mean") <= 1e-5, found
        assert found["large mean"] <= 1e-3


@torch.no_grad()
def tokens() -> list[float]:
    """Of ``(batch, channels, tokens)``, in the order of rows, as before attention."""
    group, module, x = everyone(), norm(), ramp(7)
    rows = partition(7, group.world_size, HEIGHT)
    whole = module(x.flatten(2))
    at = [n * 6 for n in rows.rows]
    found = on_shards(group, module, shard_group_norm, lambda y: module(y.flatten(2)), x, rows)
    return [error(found, whole.split(at, 2)[group.rank_in_group])]


def test_tokens_are_normed_as_the_rows_that_they_are(ranks):
    assert max(value for found in ranks.run(tokens, world_size=3) for value in found) <= 1e-5


@torch.no_grad()
def low_precision() -> tuple[bool, float, float]:
    """The error against float64, and that of float64's own result, rounded."""
    group, module = everyone(), norm().to(torch.bfloat16)
    x = ramp(11, torch.bfloat16)
    rows = partition(11, group.world_size, HEIGHT)
    found = on_shards(group, module, shard_group_norm, module, x, rows)
    whole = nn.functional.group_norm(
        x.double(), 4, module.weight.double(), module.bias.double(), module.eps
    )
    truth = part_of(whole, rows, group.rank_in_group, 1)
    rounded = error(truth.bfloat16().double(), truth)
    return found.dtype is torch.bfloat16, error(found.double(), truth), rounded


def test_bfloat16_keeps_its_type_and_is_rounded_only_at_the_end(ranks):
    for same_type, found, rounded in ranks.run(low_precision):
        assert same_type
        assert found <= 1.01 * rounded


def naive() -> float:
    """What norms of each shard by itself, or averages of their variances, would be off."""
    x = ramp(11).double()
    parts = x.split(split_sizes(11, 2), 2)
    variances = [part.reshape(2, 4, -1).var(2, correction=0) for part in parts]
    whole = x.reshape(2, 4, -1).var(2, correction=0)
    return float(((sum(variances) / 2 - whole) / whole).abs().max())


def test_the_ramp_tells_an_average_of_variances_from_the_variance():
    assert naive() > 0.5
