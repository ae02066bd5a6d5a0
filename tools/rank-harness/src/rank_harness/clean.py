"""Put a reused rank process back into the state that it started in."""

from __future__ import annotations

import gc
import os
import random
import sys
from dataclasses import dataclass, field
from typing import TextIO

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

SEED = 0


@dataclass(frozen=True)
class CleanState:
    """The state of a process at the time that this object is made."""

    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    folder: str = field(default_factory=os.getcwd)
    search_path: list[str] = field(default_factory=lambda: list(sys.path))
    streams: tuple[TextIO, TextIO] = field(default_factory=lambda: (sys.stdout, sys.stderr))

    def restore(self) -> None:
        """Undo what a test may have left behind, and collect its objects.

        Raises:
            RuntimeError: A process group cannot be destroyed; the process is then not fit
                for another run.
        """
        if dist.is_initialized():
            dist.destroy_process_group()
        # The name of the default group is a count that an initialisation which failed has
        # raised, on some ranks only; ranks that disagree on the name never find each other.
        distributed_c10d._world.group_count = 0
        self._restore_python()
        _restore_torch()
        gc.collect()

    def _restore_python(self) -> None:
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.folder)
        sys.path[:] = self.search_path
        sys.stdout, sys.stderr = self.streams
        random.seed(SEED)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(SEED)


def _restore_torch() -> None:
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    if torch.are_deterministic_algorithms_enabled():  # the setter loads the compiler: seconds
        torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(SEED)
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
