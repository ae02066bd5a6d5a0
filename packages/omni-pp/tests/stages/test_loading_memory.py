"""What a rank holds while it loads its stage."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Self

import pytest
import torch
from torch import nn
from toy_stages import ToyBlock, ToyTransformer

from omni_parallel_state import ParallelLayout, ParallelState
from omni_pp import load_stage
from omni_pp.partition import partition_of
from rank_harness import RankPool

files = pytest.importorskip("safetensors.torch")

M_MMAP_THRESHOLD = -3  # of malloc.h: what is larger goes back to the system when it is freed
WIDTH, BLOCKS = 1280, 16  # 16 blocks of 6.6 MB
SLACK = 6e6  # threads, and what the first call of anything leaves behind


class HeavyBlock(ToyBlock):
    """With weights that count; the model is not called here."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.heavy = nn.Linear(WIDTH, WIDTH)


class Heavy(ToyTransformer):
    """In blocks of which each is small beside a stage."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        super().__init__(0)
        self.blocks = nn.ModuleList(HeavyBlock(seed) for seed in range(blocks))


def held() -> int:
    """Bytes of this process that are in no file."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(x for x in text.splitlines() if x.startswith("RssAnon")).split()[1])


class Peak:
    """The most that was held within the block, beyond what was held before."""

    def __enter__(self) -> Self:
        self.before = self.most = held()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.most = max(self.most, held())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.most, held()) - self.before


def peaks(folder: Path, small: Path) -> tuple[int, int, int, int]:
    """Of loading a stage, its part, a block, and of loading all."""
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**20)
    state = ParallelState(ParallelLayout(pp=2))
    load_stage(ToyTransformer, small, state=state)  # what is imported and started once
    with Peak() as loading:
        model = load_stage(Heavy, folder, state=state)
    part = partition_of(model)
    assert part is not None
    block = sum(p.nbytes for p in part.blocks_of(0)[0][1].parameters())
    with Peak() as whole:
        kept = load_stage(Heavy, folder, state=ParallelState(ParallelLayout(dp=2)))
    assert kept is not None
    return loading.bytes, part.parameter_bytes, block, whole.bytes


def test_no_rank_holds_more_than_its_part_and_two_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder, small = tmp_path / "large", tmp_path / "small"
    for place, model in ((folder, Heavy()), (small, ToyTransformer())):
        place.mkdir()
        files.save_file(model.state_dict(), place / "model.safetensors")
    total = sum(p.nbytes for p in Heavy().parameters())
    with RankPool() as pool:  # a fresh process has no freed pages at hand
        found = pool.run(peaks, folder, small, world_size=2)
    for loading, part, block, whole in found:
        assert part + 2 * block + SLACK < 0.8 * total, "the test shows nothing"
        assert 0.9 * part < loading < part + 2 * block + SLACK
        assert whole > 0.9 * total, "the measure sees nothing"
