"""Ranks with other weights are told so when an autoencoder is made parallel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_vaes import SmallVae, everyone, state_of, text_of
from torch import nn

from omni_vae_patch import VaeParallelConfig, parallelize_vae
from omni_vae_patch.same_weights import marks_of

EXACT = VaeParallelConfig("exact", verify=False)


def changed(where: str) -> nn.Module:
    """An autoencoder of which a rank has something else."""
    vae: Any = SmallVae(nn.Sequential(nn.BatchNorm2d(8).eval(), nn.Conv2d(8, 8, 1, bias=False)))
    nn.init.normal_(vae.decoder[3][1].weight, generator=torch.Generator().manual_seed(1))
    if torch.distributed.get_rank() != 1:
        return vae
    if where == "a value":
        vae.decoder[5].weight[2, 7, 1, 1] += 1e-7
    elif where == "an order":
        vae.decoder[0].weight.copy_(vae.decoder[0].weight.flip(0))
    elif where == "a buffer":
        vae.decoder[3][0].running_var[3] = 1.5
    elif where == "a sign of zero":
        vae.decoder[1].bias[0] = -0.0
    elif where == "a shape":
        vae.decoder[3][1] = nn.Conv2d(8, 8, 1, groups=2, bias=False)
    elif where == "a dtype":
        vae.encoder.double()
    elif where == "one more":
        vae.further = nn.Linear(2, 2)
    return vae


FIRST = {
    "a value": "'decoder.5.weight' is the first of other values on rank 1 than on rank 0",
    "an order": "'decoder.0.weight' is the first of other values",
    "a buffer": "'decoder.3.0.running_var' is the first of other values",
    "a sign of zero": "'decoder.1.bias' is the first of other values",
    "a shape": "rank 0 has decoder.3.1.weight torch.float32 (8, 8, 1, 1), rank 1 decoder.3.1.weig",
    "a dtype": "rank 0 has encoder.0.weight torch.float32 (8, 3, 3, 3), rank 1 encoder.0.weight "
    "torch.float64",
    "one more": "rank 1 further.weight torch.float32 (2, 2)",
}


@torch.no_grad()
def told(mode: Any) -> list[tuple[str, bool]]:
    found = []
    for where in FIRST:
        vae = changed(where)
        before = state_of(vae)
        config = VaeParallelConfig(mode, verify=False)
        text = text_of(
            lambda vae=vae, config=config: parallelize_vae(vae, config, group=everyone())
        )
        found.append((text, state_of(vae) == before))
    return [*found, (text_of(lambda: parallelize_vae(changed(""), EXACT, group=everyone())), True)]


@pytest.mark.parametrize("mode", ["exact", "auto", "tile"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_first_weight_that_differs_is_named_on_every_rank(ranks, mode, world_size):
    for *found, last in ranks.run(told, mode, world_size=world_size):
        for (where, message), (text, same) in zip(FIRST.items(), found, strict=True):
            assert text.startswith("RankMismatchError: the weights of SmallVae differ"), where
            assert message in text, where
            assert same
        assert last[0] == "none" or (mode == "tile" and "tiling" in last[0])


def test_every_kind_of_weight_has_a_mark():
    module = nn.Module()
    for name, value in {
        "eighths": torch.randn(3, 5).to(torch.float8_e4m3fn),
        "halfs": torch.randn(3, 5).half(),
        "doubles": torch.randn(7).double(),
        "complex": torch.randn(2, 3, dtype=torch.complex64),
        "truth": torch.rand(4) > 0.5,
        "scalar": torch.tensor(3),
        "none": torch.empty(0, 4),
        "strided": torch.randn(4, 6).t(),
        "content-free": torch.empty(3, device="meta"),
    }.items():
        module.register_buffer(name, value)
    marks = marks_of(module)
    assert [mark[0] for mark in marks] == list(dict(module.named_buffers()))
    assert all(isinstance(mark[-1], int) for mark in marks)
    seen = {mark[0] for mark in marks if mark[-1]}
    assert seen >= {"eighths", "halfs", "doubles", "complex", "scalar", "strided"}
    assert marks_of(module) == marks
