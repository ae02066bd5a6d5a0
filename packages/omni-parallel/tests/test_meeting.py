"""Hosts meet by the addresses of the network that they share, whatever their names stand for."""

from __future__ import annotations

import socket

import pytest

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_parallel.launching import meeting as module
from omni_parallel.launching.meeting import (
    address_towards,
    gloo_variables,
    interface_of,
    is_this_host,
    meeting,
)

ELSEWHERE = "192.0.2.1:29400"  # an address of documentation, which no host has


def test_an_endpoint_is_of_this_host_or_of_another() -> None:
    assert is_this_host("localhost:29400")
    assert is_this_host("127.0.0.1:29400")
    assert not is_this_host(ELSEWHERE)


def test_a_host_is_reached_by_an_address_of_the_shared_network() -> None:
    assert address_towards("127.0.0.1:1") == "127.0.0.1"
    name = interface_of("127.0.0.1")
    assert name in [found for _, found in socket.if_nameindex()]
    assert interface_of("192.0.2.1") is None


def test_gloo_takes_the_shared_network_unless_the_user_says_which(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    found = gloo_variables("127.0.0.1:29400")
    assert found == {"GLOO_SOCKET_IFNAME": interface_of("127.0.0.1")}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert gloo_variables("127.0.0.1:29400") == {}


def test_where_nobody_answers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(parameters: module.RendezvousParameters) -> None:
        assert parameters.get_as_bool("is_host") is False
        raise module.RendezvousConnectionError

    monkeypatch.setattr(module, "get_rendezvous_handler", nobody)
    monkeypatch.setattr(module, "address_towards", lambda _: "192.0.2.7")
    with pytest.raises(ParallelError, match=f"nobody answers at {ELSEWHERE}; --rdzv-endpoint is"):
        meeting(ELSEWHERE, "run", 2)


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [("no-such-host.invalid:1", "no host is known as"), ("a:b:c", "legal: HOST:PORT")],
)
def test_an_endpoint_that_is_none(endpoint: str, said: str) -> None:
    with pytest.raises(ParallelConfigError, match=said):
        meeting(endpoint, "run", 2)
