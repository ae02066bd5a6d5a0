"""Ranks on accelerators, several on each where there are fewer accelerators than ranks."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from omni_parallel_state import destroy_distributed_environment, init_distributed_environment

NEEDED = pytest.mark.skipif(
    not torch.accelerator.is_available(), reason="torch finds no accelerator here"
)
"""Marks tests that compute on one."""

_SHARED = {
    "NCCL_NET": "Socket",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NCCL_NVLS_ENABLE": "0",
}


def run(ranks: Any, function: Callable[..., Any], *args: Any, world_size: int) -> list[Any]:
    """What a function gives on so many ranks, each with a device as its first argument.

    nccl refuses two ranks on one device unless it takes them for ranks of two hosts; they then
    talk by sockets, and take turns on the device.
    """
    __tracebackhide__ = True
    shared = world_size > torch.accelerator.device_count()
    kind = torch.accelerator.current_accelerator()
    if shared and (kind is None or kind.type != "cuda"):
        pytest.skip(f"{world_size} ranks need as many accelerators of this kind")
    found: list[Any] = ranks.run(
        _on_device,
        function,
        *args,
        shared=shared,
        world_size=world_size,
        init=False,
        env=_SHARED if shared else {},
        timeout=110,
    )
    return found


@torch.no_grad()
def _on_device(function: Callable[..., Any], *args: Any, shared: bool) -> Any:
    rank = int(os.environ["RANK"])
    if shared:
        os.environ["NCCL_HOSTID"] = f"rank {rank}"
    device = device_of(rank)
    init_distributed_environment(device=device, timeout=timedelta(seconds=60))
    try:
        with exact():
            return function(device, *args)
    finally:
        destroy_distributed_environment()


def device_of(rank: int) -> torch.device:
    """That of a rank; it is made the current one."""
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    device = torch.device(kind.type, rank % torch.accelerator.device_count())
    torch.accelerator.set_device_index(device)
    return device


@contextmanager
def exact() -> Iterator[None]:
    """Convolutions and products of float32 in float32: by default some are in TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def on(device: torch.device, value: Any) -> Any:
    """Arguments of a call, with their tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: on(device, item) for key, item in value.items()}
    if isinstance(value, list):
        return [on(device, item) for item in value]
    return value


class HostSyncs:
    """Counts where the host waits for a CUDA device, by file and line, while it is on."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self._caught: Any = None
        self._catching: Any = None

    def __enter__(self) -> HostSyncs:
        self._catching = warnings.catch_warnings(record=True)
        self._caught = self._catching.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._catching.__exit__(None, None, None)
        self.found.update(
            f"{Path(one.filename).name}:{one.lineno}"
            for one in self._caught
            if "synchronizing" in str(one.message)
        )
