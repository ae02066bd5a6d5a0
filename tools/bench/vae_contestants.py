"""The contestants of decoding: without exchange, by tiles, and with the feature maps split."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from bench.contestants import Named, applied
from bench.vae_models import tile
from bench.vae_results import FLOOR
from omni_parallel_state import ParallelLayout

RANKS: Final = 2
DISTVAE: Final = "DistVAE"
_OMNI: Final = "omni-vae-patch"
_SIDES: Final = {"height": -2, "width": -1, "height+keys": -2, "width+keys": -1}
_ALL_KEYS: Final = "+keys"


@dataclass(frozen=True)
class VaeContestant(Named):
    """One way to decode a latent.

    Attributes:
        side: Whose it is.
        mode: What ``--modes`` calls it.
    """

    side: str
    mode: str

    @property
    def alone(self) -> bool:
        """Whether one process does all."""
        return self.side == "diffusers"

    @property
    def dim(self) -> int | None:
        """The side that is split, from the end."""
        return _SIDES.get(self.mode)

    @property
    def counts_traffic(self) -> bool:
        """Whether it sends over this repository's groups, which count."""
        return self.side == _OMNI

    def apply(self, vae: Any, family: str, latent: Tensor) -> Callable[[], None]:
        """Make an autoencoder ready in place, on every rank.

        Returns:
            Takes that back, as far as it can.
        """
        if self.dim is None:
            tile(vae, family, latent)
        if self.side == _OMNI:
            return _parallelize(vae, self.mode)
        if self.side == DISTVAE:
            _adapt(vae, _SIDES[self.mode])
        return lambda: None  # neither diffusers nor DistVAE has a way back

    def own(self, whole: Tensor) -> Tensor:
        """What this rank has of a latent, or of a sample: its rows where nothing is exchanged."""
        if self.side != FLOOR or self.dim is None:
            return whole
        return whole.chunk(dist.get_world_size(), self.dim)[dist.get_rank()].contiguous()

    def run(self, vae: Any, latent: Tensor) -> Tensor:
        """Decode, once `apply` was called."""
        with all_keys() if self.mode.endswith(_ALL_KEYS) else nullcontext():
            sample: Tensor = vae.decode(self.own(latent), return_dict=False)[0]
        return sample


@contextmanager
def all_keys() -> Iterator[None]:
    """Give each query as many keys as there are on all ranks.

    Of a floor that has its own alone half of the attention is missing, which nothing that is
    exact can leave out.
    """
    attend = functional.scaled_dot_product_attention

    def attend_to_all(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        ranks = dist.get_world_size()
        key, value = (torch.cat([one] * ranks, dim=-2) for one in (key, value))
        return attend(query, key, value, *args, **kwargs)

    with patch.object(functional, "scaled_dot_product_attention", attend_to_all):
        yield


def _parallelize(vae: Any, mode: str) -> Callable[[], None]:
    from omni_vae_patch import VaeParallelConfig, parallelize_vae

    configs = {
        "height": VaeParallelConfig("exact", "height", verify=False),
        "width": VaeParallelConfig("exact", "width", verify=False),
        "tiles": VaeParallelConfig("tile"),
    }
    ranks = dist.get_world_size()
    layout = ParallelLayout(dp=ranks, vae=ranks)
    return applied(layout, "cpu", lambda state: parallelize_vae(vae, configs[mode], state=state))


def _adapt(vae: Any, dim: int) -> None:
    try:
        chosen = importlib.import_module("distvae.vae")
        adapters = importlib.import_module("distvae.modules.adapters.vae.decoder_adapters")
    except ModuleNotFoundError as error:
        msg = "not installed, and not needed otherwise: pip install --no-deps distvae"
        raise RuntimeError(msg) from error
    adapter = getattr(adapters, chosen.decoder_adapter_name(vae))
    vae.decoder = adapter(vae.decoder, vae_group=dist.group.WORLD, patch_dim=dim)


def vae_contestants() -> list[VaeContestant]:
    """Every contestant."""
    return [
        VaeContestant(FLOOR, "height"),
        VaeContestant(FLOOR, "width"),
        VaeContestant(FLOOR, f"height{_ALL_KEYS}"),
        VaeContestant(FLOOR, f"width{_ALL_KEYS}"),
        VaeContestant("diffusers", "tiles"),
        VaeContestant(_OMNI, "height"),
        VaeContestant(_OMNI, "width"),
        VaeContestant(_OMNI, "tiles"),
        VaeContestant(DISTVAE, "height"),
        VaeContestant(DISTVAE, "width"),
    ]
