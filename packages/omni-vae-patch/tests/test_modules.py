"""Every kind of module on shards gives the rows of the whole, or says why it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_vaes import error, everyone, part_of, random
from torch import nn

from omni_vae_patch.spatial.convolutions import least_rows
from omni_vae_patch.spatial.padding import rows_for_padding
from omni_vae_patch.spatial.partition import HEIGHT, WIDTH, Partition
from omni_vae_patch.spatial.region import Region
from omni_vae_patch.spatial.rules import apply_rule, rules_of
from omni_vae_patch.spatial.shard import SpatialShard

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

# Uneven rows of the coarsest map, by ranks; a rank of one row, and one without any.
ROWS = {
    2: [(4, 3), (1, 2), (5, 0)],
    3: [(3, 2, 2), (1, 1, 3), (2, 2, 0)],
}


def made(make: Any, *args: Any, **options: Any) -> Any:
    """A module with random weights, the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = make(*args, **options)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
    return module.eval().requires_grad_(False)


def net(*modules: Any) -> Any:
    return nn.Sequential(*modules).eval()


def pool(make: Any, *args: Any, **options: Any) -> Any:
    return net(make(*args, **options))


def conv(*args: Any, **options: Any) -> Any:
    make = nn.Conv3d if isinstance(args[0], tuple) and len(args[0]) == 3 else nn.Conv2d
    return made(make, 4, 4, *args, **options)


def transposed(*args: Any, **options: Any) -> Any:
    make = nn.ConvTranspose3d if isinstance(args[0], tuple) else nn.ConvTranspose2d
    return net(made(make, 4, 6, *args, **options))


# How much finer than the rows the map is; a net; whether it is of videos.
IMAGES: dict[str, tuple[int, Any]] = {
    "average, 2": (2, pool(nn.AvgPool2d, 2)),
    "average, 3 in step": (1, pool(nn.AvgPool2d, 3, 1, 1)),
    "average, 3 in step, counting what is there": (
        1,
        pool(nn.AvgPool2d, 3, 1, 1, count_include_pad=False),
    ),
    "average, 5 by 3": (1, pool(nn.AvgPool2d, (5, 3), 1, (2, 1), count_include_pad=False)),
    "average, 4 in steps of 2": (2, pool(nn.AvgPool2d, 4, 2, 1)),
    "average, 3 in steps of 2": (2, pool(nn.AvgPool2d, 3, 2, 1)),
    "average to the end": (2, pool(nn.AvgPool2d, 3, 2, ceil_mode=True)),
    "average to the end, padded": (
        2,
        pool(nn.AvgPool2d, 4, 2, 1, ceil_mode=True, count_include_pad=False),
    ),
    "average with a divisor": (1, pool(nn.AvgPool2d, 3, 1, 1, divisor_override=5)),
    "average across alone": (1, pool(nn.AvgPool2d, (1, 1), (1, 1))),
    "largest, 2": (2, pool(nn.MaxPool2d, 2)),
    "largest, 3": (1, pool(nn.MaxPool2d, 3, 1, 1)),
    "largest, 3 in steps of 2": (2, pool(nn.MaxPool2d, 3, 2, 1)),
    "largest, dilated": (1, pool(nn.MaxPool2d, 3, 1, 1, dilation=(1, 1))),
    "largest to the end": (2, pool(nn.MaxPool2d, 3, 2, ceil_mode=True)),
    "powers": (2, pool(nn.LPPool2d, 2, 2)),
    "mean of all": (1, pool(nn.AdaptiveAvgPool2d, 1)),
    "largest of all": (1, pool(nn.AdaptiveMaxPool2d, (1, 1))),
    "mean and back": (
        1,
        net(nn.AdaptiveAvgPool2d((1, 1)), conv(1), nn.Sigmoid()),
    ),
    "bilinear": (1, pool(nn.Upsample, scale_factor=2, mode="bilinear")),
    "bilinear, 3": (1, pool(nn.Upsample, scale_factor=3.0, mode="bilinear")),
    "bilinear, 1.5": (2, pool(nn.Upsample, scale_factor=1.5, mode="bilinear")),
    "bilinear, half": (2, pool(nn.Upsample, scale_factor=0.5, mode="bilinear")),
    "bilinear, quarter": (4, pool(nn.Upsample, scale_factor=0.25, mode="bilinear")),
    "bilinear, each side": (1, pool(nn.Upsample, scale_factor=(2, 3), mode="bilinear")),
    "bilinear, recomputed": (
        1,
        pool(nn.Upsample, scale_factor=2.0, mode="bilinear", recompute_scale_factor=True),
    ),
    "bilinear by corners": (
        1,
        pool(nn.Upsample, scale_factor=2, mode="bilinear", align_corners=True),
    ),
    "bilinear by corners, half": (
        2,
        pool(nn.Upsample, scale_factor=0.5, mode="bilinear", align_corners=True),
    ),
    "bilinear, by torch's old name": (1, pool(nn.UpsamplingBilinear2d, scale_factor=2)),
    "bicubic": (1, pool(nn.Upsample, scale_factor=2, mode="bicubic")),
    "bicubic, half": (4, pool(nn.Upsample, scale_factor=0.5, mode="bicubic")),
    "nearest": (1, pool(nn.Upsample, scale_factor=2)),
    "nearest, half": (2, pool(nn.Upsample, scale_factor=0.5, mode="nearest-exact")),
    "nearest, by torch's old name": (1, pool(nn.UpsamplingNearest2d, scale_factor=2)),
    "transposed, 2": (1, transposed(2, 2)),
    "transposed, 3": (1, transposed(3, 1, 1)),
    "transposed, 4": (1, transposed(4, 2, 1)),
    "transposed, 3 and a row": (1, transposed(3, 2, 1, output_padding=1)),
    "transposed, 5 and a row": (1, transposed(5, 2, 2, output_padding=1)),
    "transposed, 1 and a row": (1, transposed(1, 2, 0, output_padding=1)),
    "transposed, dilated": (1, transposed(3, 1, 2, dilation=2)),
    "transposed, no bias": (1, transposed(6, 3, 2, output_padding=1, bias=False)),
    "mirrored": (2, net(nn.ReflectionPad2d(1), conv(3))),
    "repeated": (1, net(nn.ReplicationPad2d(2), conv(5))),
    "constant": (1, net(nn.ConstantPad2d(1, 3.0), conv(3))),
    "constant, each side": (2, net(nn.ConstantPad2d((2, 1, 0, 1), 3.0), conv((3, 4), 2))),
    "zeros at the end": (2, net(nn.ZeroPad2d((0, 1, 0, 1)), conv(3, 2))),
    "zeros at the beginning": (2, net(nn.ZeroPad2d((1, 0, 1, 0)), conv(3, 2))),
    "more at the beginning": (1, net(nn.ZeroPad2d((2, 1, 2, 1)), nn.SiLU(), conv(4))),
    "wrapped": (2, net(nn.CircularPad2d(1), conv(3))),
    "wrapped by the convolution": (2, net(conv(3, padding=1, padding_mode="circular"))),
    "wrapped in steps": (2, net(conv(3, 2, padding=1, padding_mode="circular"))),
    "as large, 2": (1, net(conv(2, padding="same"))),
    "as large, 4": (1, net(conv(4, padding="same"))),
    "as large, dilated": (2, net(conv((4, 3), padding="same", dilation=(3, 1)))),
    "as large, mirrored": (2, net(conv(2, padding="same", padding_mode="reflect"))),
    "as large, repeated": (1, net(conv(4, padding="same", padding_mode="replicate"))),
    "as large, wrapped": (2, net(conv(4, padding="same", padding_mode="circular"))),
}
VIDEOS: dict[str, tuple[int, Any]] = {
    "average": (2, pool(nn.AvgPool3d, 2)),
    "average, 3": (1, pool(nn.AvgPool3d, 3, 1, 1, count_include_pad=False)),
    "average, over time alone": (1, pool(nn.AvgPool3d, (2, 1, 1))),
    "largest": (2, pool(nn.MaxPool3d, 3, 2, 1)),
    "mean of all": (1, pool(nn.AdaptiveAvgPool3d, 1)),
    "mean of each frame": (1, pool(nn.AdaptiveAvgPool3d, (None, 1, 1))),
    "trilinear": (1, pool(nn.Upsample, scale_factor=(1, 2, 2), mode="trilinear")),
    "trilinear by corners": (
        1,
        pool(nn.Upsample, scale_factor=2, mode="trilinear", align_corners=True),
    ),
    "transposed": (1, transposed((3, 4, 4), (1, 2, 2), (1, 1, 1))),
    "transposed, local": (1, transposed((2, 2, 2), (2, 2, 2))),
    "repeated": (1, net(nn.ReplicationPad3d((1, 1, 1, 1, 2, 0)), conv((3, 3, 3)))),
    "mirrored": (2, net(nn.ReflectionPad3d((1, 1, 1, 1, 1, 1)), conv((3, 3, 3)))),
    "zeros": (2, net(nn.ZeroPad3d((0, 1, 0, 1, 2, 0)), conv((3, 3, 3), (1, 2, 2)))),
    "as large": (1, net(conv((2, 4, 2), padding="same"))),
    "wrapped": (2, net(conv((3, 3, 3), padding=1, padding_mode="circular"))),
}
LOCAL: dict[str, tuple[int, Any]] = {
    type(module).__name__: (1, net(module))
    for module in (
        made(nn.PReLU, 4),
        nn.GLU(1),
        nn.Softplus(),
        nn.Hardsigmoid(),
        nn.ChannelShuffle(2),
        nn.Softmax2d(),
        nn.Softmax(1),
        nn.LogSoftmax(1),
        nn.Softmin(1),
        nn.CELU(),
        nn.SELU(),
        nn.Hardtanh(),
        nn.Hardshrink(),
        nn.Softshrink(),
        nn.Softsign(),
        nn.Tanhshrink(),
        nn.Threshold(0.1, 0.2),
        nn.LogSigmoid(),
        nn.RReLU(),
        nn.LocalResponseNorm(2),
        nn.AlphaDropout(),
        nn.FeatureAlphaDropout(),
    )
}


def shapes(factor: int, rows: tuple[int, ...], dim: int, frames: bool) -> list[int]:
    """Of a map that has so many rows along one side."""
    sides = [12, 12]
    sides[dim] = sum(rows) * factor
    return [2, 4, *([4] if frames else []), *sides]


def least(module: nn.Module) -> int:
    """Rows that a rank needs."""
    parts = list(module.modules())
    convolutions = [one for one in parts if isinstance(one, nn.Conv2d | nn.Conv3d)]
    return max(*map(rows_for_padding, parts), *map(least_rows, convolutions), 1)


@torch.no_grad()
def errors(cases: dict[str, tuple[int, Any]], frames: bool, rows: Any) -> dict[str, float]:
    """The largest of each case on this rank; its modules are as before afterwards."""
    group, found = everyone(), {}
    me = group.rank_in_group
    for name, (factor, module) in cases.items():
        found[name] = 0.0
        before = {one: set(vars(part)) for one, part in module.named_modules()}
        for counts in rows:
            if min(filter(None, counts)) * factor < least(module):
                continue
            for dim in (HEIGHT, WIDTH):
                split = Partition(dim, counts)
                x = random(*shapes(factor, counts, dim, frames))
                whole, region = module(x), Region()
                undo = [apply_rule(*one, region) for one in rules_of(module)]
                if counts[me]:
                    with region.of(SpatialShard(group, split)):
                        got = module(part_of(x, split, me, factor))
                    if whole.shape[dim] > 1:
                        finer = whole.shape[dim] * factor // x.shape[dim]
                        step = whole.shape[dim] / sum(counts)
                        assert step == int(step), (name, finer)
                        whole = part_of(whole, split, me, int(step))
                    found[name] = max(found[name], error(got, whole))
                while undo:
                    undo.pop()()
        assert {one: set(vars(part)) for one, part in module.named_modules()} == before
    return found


@pytest.mark.parametrize("world_size", ROWS)
@pytest.mark.parametrize(
    ("cases", "frames"),
    [(IMAGES, False), (VIDEOS, True), (LOCAL, False), (LOCAL, True)],
    ids=["images", "videos", "local", "local of videos"],
)
def test_a_module_on_shards_gives_the_rows_of_the_whole(ranks, cases, frames, world_size):
    if frames and cases is LOCAL:
        cases = {name: case for name, case in cases.items() if name != "Softmax2d"}
    for found in ranks.run(errors, cases, frames, ROWS[world_size], world_size=world_size):
        wrong = {name: off for name, off in found.items() if off > 1e-5}
        assert not wrong
