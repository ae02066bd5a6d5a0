"""The guide's table is that of the tested autoencoders, and its example works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from small_vaes import SmallVae, error, everyone, random
from stock_autoencoders import CASES
from torch import Tensor, nn

from omni_vae_patch import VaeParallelConfig, parallelize_vae
from omni_vae_patch.spatial import rules

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "autoencoders.md"


def test_the_guide_lists_every_autoencoder():
    text = GUIDE.read_text()
    table = text.split("<!-- autoencoders:begin -->")[1].split("<!-- autoencoders:end -->")[0]
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \|", table, re.MULTILINE)
    classes = {type(case.build()) for case in CASES.values()}
    # Cosmos has the switches of tiling, and no code for it.
    tiles = {cls: any(name.endswith("tiled_decode") for name in dir(cls)) for cls in classes}
    tested = {(cls.__name__, "yes", "yes" if tiles[cls] else "no") for cls in classes}
    assert sorted(listed) == sorted(tested)


class ChannelAttention(nn.Module):
    """As a decoder of one's own might have it: it weighs channels by their means over space."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Linear(8, 8)
        nn.init.normal_(self.weigh.weight, generator=torch.Generator().manual_seed(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weigh(x.mean((-2, -1))).sigmoid()[..., None, None]


def example() -> str:
    """The code of the guide that registers a rule."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (found,) = [block for block in blocks if "register_rule(ChannelAttention" in block]
    return found


@torch.no_grad()
def with_the_rule_of(code: str) -> tuple[float, float]:
    """Errors on each side, with the class as the guide has it and with its rule."""
    scope: dict[str, Any] = {"ChannelAttention": ChannelAttention}
    code = re.sub(r"^from my_model import .*$", "", code, flags=re.MULTILINE)
    try:
        exec(code, scope)
        vae, z = SmallVae(ChannelAttention()), random(1, 4, 7, 6)
        alone, found = vae.decode(z), []
        for dim in ("height", "width"):
            config = VaeParallelConfig("exact", dim)
            with parallelize_vae(vae, config, group=everyone()):
                found.append(error(vae.decode(z), alone))
        assert "forward" not in vars(vae.decoder[3])
    finally:
        rules._registered.pop(ChannelAttention, None)
    return found[0], found[1]


def test_the_rule_of_the_guide_works(ranks):
    for found in ranks.run(with_the_rule_of, example(), world_size=3):
        assert max(found) <= 1e-5
