"""What a decode sends: each convolution one exchange with neighbours, each norm one reduction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from small_vaes import everyone
from stock_autoencoders import CASES, decoded
from torch import Tensor, nn

from omni_group_coordinator import Traffic, record_traffic
from omni_group_coordinator.checked_group import CheckedGroup
from omni_vae_patch import VaeParallelConfig, parallelize_vae

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:In CPU autocast:UserWarning"
)

RANKS = 3
HEIGHT, WIDTH = 9, 6  # of the latent: three rows or two columns for each rank


@dataclass(frozen=True)
class Call:
    """What one call of a module sent.

    Attributes:
        name: Of the module.
        is_norm: Whether it is a group norm.
        sent: Bytes and calls, by operation.
        peers: Whom this rank sent messages, and how many bytes.
        expected: Bytes for each neighbour, by arithmetic.
    """

    name: str
    is_norm: bool
    sent: dict[str, tuple[int, int]]
    peers: dict[int, int]
    expected: int


def rows_wanted(module: nn.Module, dim: int) -> int:
    """Rows of a neighbour, on either side, in a decoder: of stride 1, with odd kernels."""
    if isinstance(module, nn.GroupNorm):
        return 0
    assert module.stride[dim] == 1
    kernel: int = module.dilation[dim] * (module.kernel_size[dim] - 1) + 1
    assert kernel % 2 == 1
    return kernel // 2


class Watch:
    """Notes what each convolution and each group norm sends, and to whom."""

    def __init__(self, traffic: Traffic, dim: int) -> None:
        self.calls: list[Call] = []
        self._traffic, self._dim = traffic, dim
        self._peers: dict[int, int] = {}

    def put_on(self, vae: nn.Module, patch: pytest.MonkeyPatch) -> None:
        exchange = CheckedGroup.iexchange

        def noting(group: Any, sends: Any, *args: Any, **more: Any) -> Any:
            for tensor, peer in sends:
                self._peers[peer] = self._peers.get(peer, 0) + tensor.nbytes
            return exchange(group, sends, *args, **more)

        patch.setattr(CheckedGroup, "iexchange", noting)
        for name, module in vae.named_modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                module._conv_forward = self._watched(name, module, module._conv_forward)
            elif isinstance(module, nn.GroupNorm):
                module.forward = self._watched(name, module, module.forward)

    def _watched(self, name: str, module: nn.Module, call: Any) -> Any:
        def watched(x: Tensor, *args: Any) -> Any:
            before = self._counts()
            self._peers.clear()
            output = call(x, *args)
            after = self._counts()
            sent = {
                key: (after[key][0] - before.get(key, (0, 0))[0], n - before.get(key, (0, 0))[1])
                for key, (_, n) in after.items()
                if after[key] != before.get(key)
            }
            # The other side as it comes in, with what a causal convolution has put around it.
            row = x.nbytes // x.shape[self._dim]
            wanted = rows_wanted(module, self._dim) * row
            is_norm = isinstance(module, nn.GroupNorm)
            self.calls.append(Call(name, is_norm, sent, dict(self._peers), wanted))
            return output

        return watched

    def _counts(self) -> dict[str, tuple[int, int]]:
        traffic = self._traffic
        return {key: (traffic.bytes_sent[key], n) for key, n in traffic.calls.items()}


@torch.no_grad()
def watched(name: str, dim: Any) -> list[Call]:
    case = CASES[name]
    vae = case.build()
    z = case.latent(HEIGHT, WIDTH, 0)
    config = VaeParallelConfig("exact", dim, verify=False)
    with (
        parallelize_vae(vae, config, group=everyone()),
        pytest.MonkeyPatch.context() as patch,
        record_traffic() as traffic,
    ):
        watch = Watch(traffic, {"height": -2, "width": -1}[dim])
        watch.put_on(vae, patch)
        decoded(vae, z)
    return watch.calls


@pytest.mark.parametrize("dim", ["height", "width"])
@pytest.mark.parametrize("name", ["kl", "kl-sdxl", "wan-2.1", "hunyuan-video", "cogvideox"])
def test_each_convolution_sends_its_rows_once_to_its_neighbours(ranks, name, dim):
    """The bytes are rows of the kernel × the other side × channels, and frames if there are."""
    for me, calls in enumerate(ranks.run(watched, name, dim, world_size=RANKS)):
        neighbours = [peer for peer in (me - 1, me + 1) if 0 <= peer < RANKS]
        convolved = [call for call in calls if not call.is_norm]
        reaching = [call for call in convolved if call.expected]
        assert len(reaching) > 10
        for call in convolved:
            if not call.expected:  # a kernel of one row, or one over time
                assert (call.sent, call.peers) == ({}, {}), call.name
                continue
            assert call.peers == dict.fromkeys(neighbours, call.expected), call.name
            assert call.sent == {"halo": (call.expected * len(neighbours), 1)}, call.name


@pytest.mark.parametrize("name", ["kl", "kl-sdxl", "hunyuan-video", "cogvideox"])
def test_each_group_norm_is_one_reduction_of_two_numbers_for_each_group(ranks, name):
    batch = 1
    for calls in ranks.run(watched, name, "height", world_size=RANKS):
        vae: Any = CASES[name].build()
        norms = {n: m for n, m in vae.named_modules() if isinstance(m, nn.GroupNorm)}
        found = [call for call in calls if call.name in norms]
        assert {call.name for call in found} == {n for n in norms if n.startswith("decoder.")}
        for call in found:
            numbers = 2 * batch * norms[call.name].num_groups
            assert call.sent == {"all_gather": (numbers * 4 * (RANKS - 1), 1)}, call.name
            assert call.peers == {}
