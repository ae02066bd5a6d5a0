"""Where the hosts of a run meet, and by which of its addresses each is reached from there.

torch asks the host's name for this, which on many hosts stands for 127.0.1.1 or for another network
than the one that the hosts share: then no host opens the meeting point, or ranks call themselves.
"""

from __future__ import annotations

import os
import socket

import psutil
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from omni_group_coordinator import ParallelConfigError, ParallelError

PATIENCE_SECONDS = 60
"""How long a host waits for the others."""
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_DEFAULT_PORT = 29400  # torchrun's


def meeting(endpoint: str, run_id: str, hosts: int) -> RendezvousHandler:
    """The meeting of so many hosts.

    Args:
        endpoint: ``host:port`` of one of them; port 0: any that is free, where there is but one.
        run_id: What all of them call the run.
        hosts: How many.

    Raises:
        ParallelConfigError: The endpoint's host is not known.
        ParallelError: Nobody answers there.
    """
    here = is_this_host(endpoint)
    # Of several launchers on the host, as in tests, the one that comes later finds the port taken.
    for opens in (True, False) if here else (False,):
        parameters = RendezvousParameters(
            backend="c10d",
            endpoint=endpoint,
            run_id=run_id,
            min_nodes=hosts,
            max_nodes=hosts,
            local_addr=address_towards(endpoint),
            timeout=PATIENCE_SECONDS,
            is_host=str(opens),
        )
        try:
            return get_rendezvous_handler(parameters)
        except RendezvousConnectionError as error:
            if not opens:
                msg = (
                    f"nobody answers at {endpoint}; --rdzv-endpoint is an address of one of the "
                    "hosts, which all of them reach, with a port that is free there"
                )
                raise ParallelError(msg) from error
    raise AssertionError(endpoint)  # the last turn returns or raises


def is_this_host(endpoint: str) -> bool:
    """Whether an address of the endpoint is one of this host, on whichever of its networks."""
    for family, address in _addresses(endpoint):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind((address, 0))
            except OSError:
                continue
            return True
    return False


def address_towards(endpoint: str) -> str:
    """The address of this host by which it is reached from the endpoint; nothing is sent.

    Raises:
        ParallelConfigError: There is no way there.
    """
    for family, address in _addresses(endpoint):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, 9))
            except OSError:
                continue
            found: str = probe.getsockname()[0]
            return found
    msg = f"{endpoint} cannot be reached from this host, whose network is down or another one"
    raise ParallelConfigError(msg)


def interface_of(address: str) -> str | None:
    """The name of the network interface that has an address."""
    for name, found in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in found):
            return str(name)
    return None


def gloo_variables(endpoint: str) -> dict[str, str]:
    """What has gloo use the network of the endpoint; empty where the user says which."""
    if GLOO_INTERFACE in os.environ:
        return {}
    name = interface_of(address_towards(endpoint))
    return {} if name is None else {GLOO_INTERFACE: name}


def _addresses(endpoint: str) -> list[tuple[int, str]]:
    try:
        host, _ = parse_rendezvous_endpoint(endpoint, default_port=_DEFAULT_PORT)
    except ValueError as error:
        msg = f"--rdzv-endpoint {endpoint}: {error}; legal: HOST:PORT"
        raise ParallelConfigError(msg) from error
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except OSError as error:
        msg = f"--rdzv-endpoint {endpoint}: no host is known as {host} here"
        raise ParallelConfigError(msg) from error
    return [(one[0], str(one[4][0])) for one in found]
