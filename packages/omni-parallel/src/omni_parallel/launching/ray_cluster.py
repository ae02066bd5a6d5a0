"""Run a function on several ranks that Ray places; all end with it."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from click import unstyle

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_parallel.launching.failures import RankFailedError, shortened
from omni_parallel.launching.hosts import accelerators
from omni_parallel.launching.interrupts import Interrupts
from omni_parallel.launching.meeting import gloo_variables
from omni_parallel.launching.processes import PATIENCE_SECONDS, POLL_SECONDS

PLACEMENT_SECONDS = 60
"""How long ranks wait for the cluster to have room."""
ANSWER_SECONDS = 10
"""How long a cluster has to answer at all."""
GRACE_SECONDS = 3.0
"""How long a rank that raised is not yet called the first to fail: another one may have died, which
Ray tells later than others see their connections to it break."""
_ADDRESS = "RAY_ADDRESS"
_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray warns of each actor without a GPU
}


@contextmanager
def ray_cluster(ranks: int) -> Iterator[RayCluster]:
    """The cluster of ``RAY_ADDRESS``; where that is not set, one on this host for so many ranks.

    Raises:
        ParallelConfigError: Ray is not installed.
        ParallelError: There is no cluster at the address, or it refuses this process.
        KeyboardInterrupt: A signal came, to end this process.
    """
    try:
        import ray
    except ImportError as error:
        msg = "--launcher ray needs Ray; try: pip install 'omni-parallel[ray]'"
        raise ParallelConfigError(msg) from error
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    address = os.environ.get(_ADDRESS)
    own = {} if address else {"num_cpus": ranks, "num_gpus": accelerators()}
    with Interrupts():
        try:
            _init(ray, address or "local", own)
            with Interrupts():  # again, for Ray has taken SIGTERM
                yield RayCluster(ray)
        finally:
            ray.shutdown()


def _init(ray: Any, address: str, own: Mapping[str, int]) -> None:
    if not own:
        _check_answers(address)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="ERROR",
            include_dashboard=False if own else None,
            **own,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "on this host" if own else f"at {_ADDRESS}={address}"
        remedy = (
            ""
            if own
            else (
                "; its Ray and Python have to be of these versions, and its authentication of this "
                "environment (RAY_AUTH_MODE, and its token)"
            )
        )
        msg = f"there is no Ray that can be used {where}: {error}{remedy}"
        raise ParallelError(msg) from error


def _check_answers(address: str) -> None:
    """Try an address, which Ray does for two minutes.

    Raises:
        ParallelError: Nobody answers there.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():  # such as auto
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        msg = (
            f"there is no Ray cluster at {_ADDRESS}={address}: {error}; legal: HOST:PORT of one, "
            "auto for that of this host, or none, for a Ray that ends with the command"
        )
        raise ParallelError(msg) from error


class RayCluster:
    """A cluster that this process is connected to.

    Args:
        ray: The library.
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        kind = torch.accelerator.current_accelerator()
        self._resource = "NPU" if kind is not None and kind.type == "npu" else "GPU"

    @property
    def accelerators(self) -> int:
        """How many it has on all hosts."""
        return int(self._ray.cluster_resources().get(self._resource, 0))

    def run(
        self, function: Callable[..., Any], args: tuple[object, ...], ranks: int, device: str | None
    ) -> dict[int, Any]:
        """Call a function on several ranks, with the variables that torchrun sets.

        Args:
            function: Importable on every host.
            args: Its arguments, the same on every rank.
            ranks: How many.
            device: ``"cpu"``; None: each rank has an accelerator of its own, and sees no other.

        Returns:
            What each rank returned.

        Raises:
            ParallelError: The cluster has no room.
            RankFailedError: A rank failed; every one has ended.
        """
        needs = {"CPU": 1} if device == "cpu" else {"CPU": 1, self._resource: 1}
        with self._placed([needs] * ranks) as actors:
            places = self._ray.get([actor.place.remote() for actor in actors])
            variables = _variables(places, alone=device != "cpu")
            calls = {
                actor.run.remote(variables[rank], function, args): rank
                for rank, actor in enumerate(actors)
            }
            try:
                return self._results(calls)
            finally:
                self._end(actors, list(calls))

    @contextmanager
    def _placed(self, bundles: list[dict[str, int]]) -> Iterator[list[Any]]:
        from ray.util import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = placement_group(bundles, strategy="PACK")
        try:
            self._wait_for(group, bundles)
            yield [
                self._ray.remote(_Rank)
                .options(
                    num_cpus=needs["CPU"],
                    resources={name: n for name, n in needs.items() if name not in ("CPU", "GPU")},
                    num_gpus=needs.get("GPU", 0),
                    max_restarts=0,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        group, placement_group_bundle_index=index
                    ),
                )
                .remote()
                for index, needs in enumerate(bundles)
            ]
        finally:
            remove_placement_group(group)

    def _wait_for(self, group: Any, bundles: list[dict[str, int]]) -> None:
        if self._ray.wait([group.ready()], timeout=PLACEMENT_SECONDS)[0]:
            return
        names = list(bundles[0])
        total, free = self._ray.cluster_resources(), self._ray.available_resources()
        here = ", ".join(f"{total.get(n, 0):g} {n} ({free.get(n, 0):g} free)" for n in names)
        msg = (
            f"the Ray cluster had no room for {len(bundles)} ranks within {PLACEMENT_SECONDS} s: "
            f"each needs {' and '.join(f'1 {name}' for name in names)}, here are {here}"
        )
        raise ParallelError(msg)

    def _results(self, calls: dict[Any, int]) -> dict[int, Any]:
        found: dict[int, Any] = {}
        failed: list[RankFailedError] = []
        waiting, end = list(calls), 0.0
        while waiting and (not failed or time.monotonic() < end):
            ready, waiting = self._ray.wait(waiting, timeout=POLL_SECONDS)
            for call in ready:
                value = self._result(call, calls[call])
                if isinstance(value, _Raised):
                    end = end or time.monotonic() + GRACE_SECONDS
                    failed.append(_failure(calls[call], "", value.traceback))
                found[calls[call]] = value
        if failed:
            raise failed[0]
        return found

    def _result(self, call: Any, rank: int) -> Any:
        from ray.exceptions import RayActorError, RayError

        try:
            return self._ray.get(call)
        except RayActorError as error:
            raise _failure(rank, ": its process died", str(error)) from None
        except RayError as error:  # such as of a module that its host does not have
            raise _failure(rank, "", unstyle(str(error))) from None

    def _end(self, actors: list[Any], calls: list[Any]) -> None:
        """End every process, and wait until Ray says so."""
        for actor in actors:
            self._ray.kill(actor)
        self._ray.wait(calls, num_returns=len(calls), timeout=PATIENCE_SECONDS)


@dataclass(frozen=True)
class _Raised:
    """Instead of an exception, which another process may be unable to unpickle."""

    traceback: str


class _Rank:
    """The process of a rank."""

    def place(self) -> tuple[str, str, int]:
        """Its host, the host's address, and a port that is free there."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            port = int(free.getsockname()[1])
        address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        return ray.get_runtime_context().get_node_id(), address, port

    def run(
        self, variables: Mapping[str, str], function: Callable[..., Any], args: tuple[object, ...]
    ) -> Any:
        """What the function returns, or what it raised."""
        endpoint = f"{variables['MASTER_ADDR']}:{variables['MASTER_PORT']}"
        os.environ.update({**gloo_variables(endpoint), **variables})
        try:
            return function(*args)
        except BaseException:
            return _Raised(traceback.format_exc())


def _variables(places: list[tuple[str, str, int]], alone: bool) -> list[dict[str, str]]:
    """Those of torchrun for each rank.

    Args:
        places: Of the ranks.
        alone: Whether a rank sees but its own accelerator, which is number 0 then.
    """
    on_host = Counter(host for host, _, _ in places)
    before: Counter[str] = Counter()
    found = []
    for rank, (host, _, _) in enumerate(places):
        found.append(
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(places)),
                "LOCAL_RANK": "0" if alone else str(before[host]),
                "LOCAL_WORLD_SIZE": str(on_host[host]),
                "MASTER_ADDR": places[0][1],
                "MASTER_PORT": str(places[0][2]),
            }
        )
        before[host] += 1
    return found


def _failure(rank: int, how: str, said: str) -> RankFailedError:
    first = f"rank {rank} was the first to fail{how} (all ranks have ended):"
    return RankFailedError(rank, f"{first}\n{shortened(said.strip())}")
