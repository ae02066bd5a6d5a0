"""A world of 4,096 ranks, simulated: what one rank pays for its layout and its state."""

from __future__ import annotations

import json
import subprocess
import sys

MIB = 2**20

SCRIPT = """
import json, time
import psutil, torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the "fake" backend

process = psutil.Process()
before = process.memory_info().rss
start = time.process_time()
from omni_parallel_state import ParallelLayout, ParallelState
imported = time.process_time()
dist.init_process_group("fake", rank=2077, world_size=4096, store=FakeStore())
layout = ParallelLayout(dp=4, cfg=2, pp=4, ring=4, ulysses=8, tp=4, vae=8)
state = ParallelState(layout)
end = time.process_time()
memory = process.memory_info().rss - before
ranks = {dim: state.__dict__[dim].ranks for dim in ("sp", "ring", "pp", "cfg", "dp", "tp", "vae")}
print(json.dumps([imported - start, end - imported, memory, ranks]))
"""


def test_4096_ranks_cost_under_2_seconds_and_200_mib() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True
    )
    importing, building, memory, ranks = json.loads(done.stdout)

    assert importing + building < 2.0
    assert memory < 200 * MIB
    # 2077 = tp 1 + 4 * (sp 7 + 32 * (pp 0 + 4 * (cfg 0 + 2 * dp 2)))
    assert ranks["tp"] == [2076, 2077, 2078, 2079]
    assert ranks["sp"] == list(range(2049, 2049 + 4 * 32, 4))
    assert ranks["ring"] == [2077, 2109, 2141, 2173]
    assert ranks["pp"] == [2077, 2205, 2333, 2461]
    assert ranks["cfg"] == [2077, 2589]
    assert ranks["dp"] == [29, 1053, 2077, 3101]
    assert ranks["vae"] == list(range(2072, 2080))
