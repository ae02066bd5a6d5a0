"""No rank process survives its session, however the session ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from rank_harness import RankPool

SESSION = """
import os, time
from rank_harness import RankPool

def report_and_hang():
    os.write(pipe, f"{os.getpid()} {os.getppid()} ".encode())
    %s

pipe = %d
if __name__ == "__main__":
    os.set_inheritable(pipe, True)
    with RankPool() as ranks:
        path = f"/proc/{os.getpid()}/fd/{pipe}"
        def open_and_hang():
            global pipe
            pipe = os.open(path, os.O_WRONLY)
            report_and_hang()
        ranks.run(open_and_hang, timeout=300)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="relies on prctl and /proc")


def runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_ended(pids, seconds=15.0):
    deadline = time.monotonic() + seconds
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [pid for pid in pids if runs(pid)]


@pytest.mark.parametrize("busy", ["time.sleep(600)", "while True: pass"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_busy_ranks_end_when_the_session_is_killed(busy, number):
    ours, theirs = os.pipe()
    code = SESSION % (busy, theirs)
    with subprocess.Popen(
        [sys.executable, "-c", code], pass_fds=[theirs], stderr=subprocess.DEVNULL
    ) as session:
        os.close(theirs)
        pids = set()
        while len(pids) < 3:  # two ranks and the fork server
            pids |= set(map(int, os.read(ours, 1000).split()))
        assert all(map(runs, pids))
        session.send_signal(number)
    os.close(ours)
    assert wait_until_ended(pids) == []


def test_close_ends_idle_ranks_at_once():
    with RankPool() as pool:
        pids = pool.run(os.getpid)
        assert pool.pids() == pids
        start = time.monotonic()
    assert time.monotonic() - start < 5.0
    assert wait_until_ended(pids) == []


def test_two_pools_work_side_by_side():
    with RankPool() as first, RankPool() as second:
        assert first.run(os.getpid) != second.run(os.getpid)


def test_closing_twice_is_harmless():
    pool = RankPool()
    pool.run(os.getpid)
    pool.close()
    pool.close()
