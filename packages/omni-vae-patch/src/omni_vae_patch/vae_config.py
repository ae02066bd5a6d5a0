"""How an autoencoder's work is divided over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from omni_group_coordinator import ParallelConfigError

Mode = Literal["auto", "exact", "tile"]
Dim = Literal["auto", "height", "width"]
Result = Literal["all", "first"]


@dataclass(frozen=True)
class VaeParallelConfig:
    """Configuration of `parallelize_vae`.

    Raises:
        ParallelConfigError: A value is not among the legal ones.
    """

    mode: Mode = "auto"
    """``"exact"``: feature maps are sharded in space, and the result is that of one rank.
    ``"tile"``: the autoencoder's own tiles are divided over the ranks, which approximate the whole.
    ``"auto"``: exact if the autoencoder can, else tiles, with a warning that says so."""

    dim: Dim = "auto"
    """Which side is sharded; ``"auto"``: the one that divides better, for each size anew; of equal
    ones the longer, but for videos on CPUs the width, which leaves torch its fast convolutions.
    Tiles are cut along both, so with them ``"auto"`` alone."""

    result: Result = "all"
    """Who gets what comes out: every rank, or the first one of the group, and the others ``None``.
    Pipelines that go on with it need it on all."""

    verify: bool = True
    """Compare with one rank on a tiny latent when the autoencoder is made parallel."""

    shared_norms: bool = False
    """With tiles: norms take their statistics from all tiles together."""

    def __post_init__(self) -> None:
        for name, value, legal in (
            ("mode", self.mode, get_args(Mode)),
            ("dim", self.dim, get_args(Dim)),
            ("result", self.result, get_args(Result)),
        ):
            if value not in legal:
                msg = f"{name}={value!r}; legal: {', '.join(map(repr, legal))}"
                raise ParallelConfigError(msg)
        if self.mode == "tile" and self.dim != "auto":
            msg = (
                f"dim={self.dim!r} with mode='tile': tiles are cut along height and width, as the "
                "autoencoder's own options say; legal: dim='auto', or mode='exact'"
            )
            raise ParallelConfigError(msg)
