"""Group norms whose statistics are shared by the tiles that are computed at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from omni_group_coordinator import GroupCoordinator, ParallelConfigError, ParallelError
from omni_vae_patch.agreement import PeerStoppedError
from omni_vae_patch.tiles.plan import TilePlan

_NORM, _DONE, _FAILED = 0, 1, 2


class SharedNorms:
    """Lets the group norms of a network see all tiles while this context is open.

    A tone that shifts from tile to tile comes from norms that see one tile each. Here every norm
    gets count, mean and sum of squared deviations of every tile, merged in float32 (Chan's
    formula), so that all tiles are normalised alike. Where tiles overlap, elements count once for
    each tile: the statistics are not those of the untiled picture, and the result is no tiled
    result of the autoencoder's own either. Without overlap they are those of the whole picture.

    All tiles go through the network in step, so each must be on a rank of its own: more tiles than
    ranks would keep several tiles' feature maps on one rank, which is what tiles are to avoid, or
    compute each tile again for each norm. They are refused.

    Args:
        network: Its `torch.nn.GroupNorm` modules take part; not compiled.
        group: The ranks.
        plan: Who computes what.
        owner: Class of the autoencoder, for messages.

    Raises:
        ParallelConfigError: A rank has several tiles, tiles take different numbers of calls,
            the network is compiled, or a norm has a forward of its own.
    """

    def __init__(
        self, network: nn.Module, group: GroupCoordinator, plan: TilePlan, owner: str
    ) -> None:
        tiles = len(plan.owners)
        if tiles > group.world_size:
            msg = (
                f"shared_norms needs a rank for each tile, and {owner} has {tiles} tiles on "
                f"{group.world_size} ranks; make tiles larger until there are at most "
                f"{group.world_size}, or share no norms"
            )
            raise ParallelConfigError(msg)
        counts = {sum(call.unit == unit for call in plan.calls) for unit in range(tiles)}
        if len(counts) > 1:
            msg = (
                f"shared_norms needs tiles that go through the network in step, and those of "
                f"{owner} take {sorted(counts)} calls; share no norms"
            )
            raise ParallelConfigError(msg)
        if any(
            hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in network.modules()
        ):
            msg = (
                f"shared_norms needs a network that is not compiled, and that of {owner} is; "
                "decode before it is compiled, or share no norms"
            )
            raise ParallelConfigError(msg)
        for name, module in network.named_modules():
            if isinstance(module, nn.GroupNorm) and not _is_plain(module):
                msg = (
                    f"shared_norms needs group norms that do what torch's do, and {name!r}, a "
                    f"{type(module).__name__} in {owner}, has a forward of its own; share no norms"
                )
                raise ParallelConfigError(msg)
        self._group = group
        self._peers = sorted(set(plan.owners) - {group.rank_in_group})
        takes_part = group.rank_in_group in plan.owners
        found = [m for m in network.modules() if isinstance(m, nn.GroupNorm)] if takes_part else []
        self._norms = found if self._peers else []

    def __enter__(self) -> Self:
        for norm in self._norms:
            norm.__dict__["forward"] = partial(self._normalise, norm)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for norm in self._norms:
            del norm.__dict__["forward"]
        if self._norms and not isinstance(error, PeerStoppedError | _OutOfStepError):
            self._meet(_DONE if error is None else _FAILED, 0, failing=error is not None)

    def _normalise(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        grouped = x.float().reshape(x.shape[0], norm.num_groups, -1)
        variance, mean = torch.var_mean(grouped, dim=2, correction=0)
        count = grouped.shape[2]
        mine = torch.stack([torch.full_like(mean, count), mean, variance * count])
        self._meet(_NORM, mine.numel())
        mean, variance = merged(self._collect(mine))
        scale = torch.rsqrt(variance + norm.eps)
        y = ((grouped - mean[..., None]) * scale[..., None]).reshape(x.shape)
        if norm.affine:
            shape = [1, -1] + [1] * (x.ndim - 2)
            y = y * norm.weight.float().view(shape) + norm.bias.float().view(shape)
        return y.to(x.dtype)

    def _meet(self, code: int, size: int, *, failing: bool = False) -> None:
        """Tell the other tiles what this one is at: none of them may wait for one that is gone."""
        mine = torch.tensor([code, size])
        found = self._swap(mine)
        if failing:
            return
        if any(int(other[0]) == _FAILED for other in found):
            raise PeerStoppedError
        if any(not torch.equal(other, mine) for other in found):
            msg = "shared_norms needs tiles that go through the same norms, and these do not"
            raise _OutOfStepError(msg)

    def _collect(self, mine: Tensor) -> list[Tensor]:
        found = dict(zip(self._peers, self._swap(mine), strict=True))
        found[self._group.rank_in_group] = mine
        return [found[rank] for rank in sorted(found)]

    def _swap(self, mine: Tensor) -> list[Tensor]:
        checked = self._group.checked
        if checked is None:
            return []
        found = [torch.empty_like(mine) for _ in self._peers]
        sends = [(mine, peer) for peer in self._peers]
        receives = list(zip(found, self._peers, strict=True))
        for work in checked.iexchange(sends, receives, "shared norms"):
            work.wait()
        return found


def _is_plain(norm: nn.GroupNorm) -> bool:
    return type(norm).forward is nn.GroupNorm.forward and "forward" not in vars(norm)


class _OutOfStepError(ParallelError):
    """The tiles went through different norms; all ranks see it."""


def merged(statistics: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of several sets of elements.

    Args:
        statistics: For each set ``(3, ...)``: count, mean, sum of squared deviations.
    """
    count, mean, squares = statistics[0]
    for count_b, mean_b, squares_b in statistics[1:]:
        both = count + count_b
        delta = mean_b - mean
        mean = mean + delta * (count_b / both)
        squares = squares + squares_b + delta.square() * (count * count_b / both)
        count = both
    return mean, squares / count
