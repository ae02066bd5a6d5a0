"""Rows and columns that the convolutions of a decoder read beyond their own: what halos are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

Convolution = nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Convolved:
    """One call of a convolution in a decode by one process.

    Attributes:
        kernel: Rows and columns that it reads at once.
        row_bytes: Of one row of its input, and of one column: other side × channels × batch ×
            frames × size of a number, with what the caller has padded or remembered.
    """

    kernel: tuple[int, int]
    row_bytes: tuple[int, int]

    @property
    def reaches(self) -> bool:
        """Whether it needs more than one row and one column."""
        return self.kernel != (1, 1)


@contextmanager
def convolutions_of(vae: nn.Module) -> Iterator[list[Convolved]]:
    """The calls of convolutions within the block, which are all of stride 1 in a decoder."""
    found: list[Convolved] = []
    with ExitStack() as stack:
        for module in vae.modules():
            if isinstance(module, Convolution):
                _record(module, found)
                stack.callback(module.__dict__.pop, "_conv_forward")
        yield found


def _record(module: Convolution, found: list[Convolved]) -> None:
    original: Callable[[Tensor, Tensor, Tensor | None], Tensor] = module._conv_forward
    spans = [d * (k - 1) + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)]

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found.append(
            Convolved((spans[-2], spans[-1]), (x.nbytes // x.shape[-2], x.nbytes // x.shape[-1]))
        )
        return original(x, weight, bias)

    # Not forward: causal convolutions pad and join frames in theirs.
    module.__dict__["_conv_forward"] = convolve


def halo_bytes(calls: Iterable[Convolved], dim: int, ranks: int) -> int:
    """What arithmetic says that the busiest rank sends: for each convolution and neighbour, rows.

    Args:
        calls: Of the whole decode.
        dim: The side that is split, from the end.
        ranks: How many; an inner one has two neighbours.
    """
    if ranks == 1:
        return 0
    down = up = 0
    for call in calls:
        reach, size = call.kernel[dim] - 1, call.row_bytes[dim]
        down += reach // 2 * size
        up += (reach - reach // 2) * size
    return down + up if ranks > 2 else max(down, up)
