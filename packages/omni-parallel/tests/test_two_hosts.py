"""Two hosts with nothing but a network between them: namespaces that a pair of veth joins."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
from PIL import Image

from omni_parallel.demo.pipeline import MODEL

CLI = "from omni_parallel.cli import main; main()"
REQUEST = [
    "generate", str(MODEL), "--prompt", "a red circle left of a blue square", "--size", "64",
    "--steps", "3", "--guidance", "3", "--negative-prompt", "", "--json",
]  # fmt: skip
ADDRESSES = ("10.213.7.1", "10.213.7.2")
TIMEOUT_S = 100


@contextmanager
def held(*command: str) -> Iterator[int]:
    """Keep namespaces alive with a process of their own; gives its id."""
    script = "echo $$; exec cat"  # which ends when its input does, so with this process too
    process = subprocess.Popen(
        [*command, "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        if not process.stdout.readline():
            _, said = process.communicate()
            pytest.skip(f"this machine forbids network namespaces: {said.strip()}")
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def enter(host: int) -> list[str]:
    return ["nsenter", f"--target={host}", "--user", "--net", "--preserve-credentials"]


def ip(host: int, *arguments: str) -> None:
    done = subprocess.run(
        [*enter(host), "ip", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"this machine forbids ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[tuple[int, int]]:
    """Two network namespaces, each given as a process in it."""
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"this needs {tool}")
    with ExitStack() as stack:
        # In a user namespace, so that it needs no privilege; the second one is of the same.
        first = stack.enter_context(held("unshare", "--user", "--map-root-user", "--net"))
        second = stack.enter_context(held(*enter(first), "unshare", "--net"))
        ip(first, "link", "add", "left", "type", "veth", "peer", "right", "netns", str(second))
        for host, name, address in zip((first, second), ("left", "right"), ADDRESSES, strict=True):
            ip(host, "address", "add", f"{address}/24", "dev", name)
            ip(host, "link", "set", name, "up")
            ip(host, "link", "set", "lo", "up")
        yield first, second


def start(host: int | None, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CLI, *REQUEST, *options]
    return subprocess.Popen(
        command if host is None else [*enter(host), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def reports(*processes: subprocess.Popen[str]) -> list[dict[str, Any]]:
    found = []
    try:
        for process in processes:
            said, errors = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, errors[-3000:]
            found.append(json.loads(said))
    finally:
        for process in processes:
            process.kill()
    return found


def pixels(path: str) -> torch.Tensor:
    with Image.open(path) as found:
        return torch.frombuffer(
            bytearray(found.convert("RGB").tobytes()), dtype=torch.uint8
        ).short()


@pytest.mark.slow
def test_two_hosts_make_the_image_of_one_process(hosts: tuple[int, int], tmp_path: Path) -> None:
    meet = ["--nnodes", "2", "--rdzv-endpoint", f"{ADDRESSES[0]}:29411"]
    outs = [str(tmp_path / name) for name in ("first.png", "second.png", "alone.png")]
    both = [
        start(host, "--layout", "ulysses=2,vae_patch=2", *meet, "--out", out)
        for host, out in zip(hosts, outs, strict=False)
    ]
    found = reports(*both)
    assert [one["ranks"] for one in found] == [2, 2]
    (file,) = [file for one in found for file in one["files"]]
    (alone,) = reports(start(None, "--nproc", "1", "--out", outs[2]))
    assert file in outs[:2]
    assert pixels(file).float().std() > 1
    assert (pixels(file) - pixels(alone["files"][0])).abs().max() <= 1
