"""Ranks for which there are no rows go through a call without computing anything."""

from __future__ import annotations

import pytest
import torch
from small_vaes import SmallVae, error, everyone, random
from stock_autoencoders import CASES, decoded
from torch import nn

from omni_vae_patch import VaeParallelConfig, nothing_to_do, parallelize_vae, register_rule

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:In CPU autocast:UserWarning"
)

EXACT = VaeParallelConfig("exact", verify=False)


@torch.no_grad()
def without_rows(name: str) -> tuple[list[str], float, float]:
    """What the modules of a decoder give on a rank, by the class of the tensor."""
    case, group = CASES[name], everyone()
    vae, z = case.build(), case.latent(2, 2, 0)
    larger = case.latent(6, 5, 0)
    alone, whole = decoded(vae, z), decoded(vae, larger)
    seen: list[str] = []
    with parallelize_vae(vae, EXACT, group=group):
        hooks = [
            module.register_forward_hook(lambda _, __, out: seen.append(type(out).__name__))
            for module in vae.decoder.modules()
            if isinstance(module, nn.Conv2d | nn.Conv3d)
        ]
        off = error(decoded(vae, z), alone)
        for hook in hooks:
            hook.remove()
        again = error(decoded(vae, larger), whole)  # what is kept between calls is as it was
    return sorted(set(seen)), off, again


@pytest.mark.parametrize("name", ["kl", "wan-2.1", "magvit", "cogvideox", "hunyuan-video"])
def test_a_rank_without_rows_computes_nothing(ranks, name):
    results = ranks.run(without_rows, name, world_size=4, timeout=90)
    assert all(max(off, again) <= 1e-5 for _, off, again in results)
    assert results[0][0] == ["Tensor"]
    assert results[3][0] == ["FakeTensor"]


class Remembering(nn.Module):
    """Makes a tensor at its first call of a width, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, torch.Tensor] = {}
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] not in self.kept:
            self.kept[x.shape[-1]] = torch.linspace(1, 2, x.shape[-1])
        self.last = self.kept[x.shape[-1]]
        return x * self.last


@torch.no_grad()
def remember() -> tuple[float, float, list[str]]:
    vae = SmallVae(Remembering())
    few, more = random(1, 4, 1, 3), random(1, 4, 6, 3)
    expected = SmallVae(Remembering()).decode(few), SmallVae(Remembering()).decode(more)
    with (
        register_rule(Remembering, nothing_to_do),
        parallelize_vae(vae, VaeParallelConfig("exact", "height", verify=False), group=everyone()),
    ):
        off = error(vae.decode(few), expected[0]), error(vae.decode(more), expected[1])
    kept = [type(one).__name__ for one in vae.decoder[3].kept.values()]
    return *off, kept


def test_a_rank_without_rows_leaves_nothing_without_content_behind(ranks):
    for few, more, kept in ranks.run(remember, timeout=40):
        assert max(few, more) <= 1e-5
        assert set(kept) == {"Tensor"}
