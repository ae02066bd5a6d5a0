"""What a rank holds while it loads and while it runs."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import pytest
import torch
from toy_sharded import Toy, config, seeded, sharing, toy

from omni_hsdp import GatherPolicy, apply_hsdp_to_model, gathered, hsdp_report, load_hsdp_model

M_MMAP_THRESHOLD = -3  # of malloc.h: what is larger goes back to the system when it is freed
WIDTH, BLOCKS = 640, 16  # 16 blocks of 6.6 MB
SLACK = 6e6  # threads, and what the first call of anything leaves behind


class Large(Toy):
    def __init__(self) -> None:
        super().__init__(BLOCKS, WIDTH)


def held() -> int:
    """Bytes of this process that are in no file."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(x for x in text.splitlines() if x.startswith("RssAnon")).split()[1])


class Peak:
    """The most that was held within the block, beyond what was held before."""

    def __enter__(self):
        self.before = self.most = held()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._stop.wait(0.001):
            self.most = max(self.most, held())

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.most, held()) - self.before


def warm_up():
    """What is imported and started once is no part of a model, nor what glibc holds back."""
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**20)
    apply_hsdp_to_model(toy(), config())(seeded(2, 6))


def peaks(folder, shard):
    with sharing(shard):
        warm_up()
        x = seeded(2, WIDTH)
        with Peak() as loading:
            model = load_hsdp_model(Large, folder, config())
        report = hsdp_report(model)
        with Peak() as running:
            model(x), model(x)
        with Peak() as once, gathered(model):
            model(x)
        return report, loading.bytes, running.bytes, once.bytes


@pytest.mark.parametrize("shard", [2, 4])
def test_no_rank_holds_the_whole_model(ranks, tmp_path, shard):
    files = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    files.save_file(Large().state_dict(), tmp_path / "model.safetensors")
    for report, loading, running, once in ranks.run(peaks, tmp_path, shard, world_size=shard):
        block = report.blocks["blocks.0"]
        assert 2 * block < report.gathered_peak < 3 * block
        most = report.total / shard + 2 * block + SLACK
        assert most < 0.8 * report.total, "the test shows nothing"
        assert loading < most
        # gloo has a copy of what it sends, and frees both late where ranks outnumber cores
        assert running < report.gathered_peak + (block if shard == 2 else 3 * block) + SLACK
        assert once > report.total, "the measure sees nothing"


def gathered_at_most(policy):
    """The most bytes of blocks that hold storage at a time, asked in each block's forward."""
    torch.manual_seed(0)
    model = Toy(8, 8)
    most = 0

    def watch(*_):
        nonlocal most
        sizes = (p.untyped_storage().nbytes() for p in unsharded)
        most = max(most, sum(sizes))

    with sharing(2):
        apply_hsdp_to_model(model, config(), policy=policy)
        with gathered(model):
            unsharded = [p for block in model.blocks for p in block.parameters()]
        assert sum(p.untyped_storage().nbytes() for p in unsharded) == 0
        for block in model.blocks:
            block.up.register_forward_hook(watch)
        model(seeded(2, 8))
        after = sum(p.untyped_storage().nbytes() for p in unsharded)
        sizes = hsdp_report(model).blocks
        return most, after, sizes["blocks.0"]


def test_one_block_is_whole_at_a_time(ranks):
    for most, after, block in ranks.run(gathered_at_most, GatherPolicy(2), world_size=2):
        assert block <= most <= 1.2 * block  # rows are padded
        assert after == 0
