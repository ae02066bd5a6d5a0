"""The umbrella on the ranks that started this, with the strategies that are named.

``run_umbrella.py omni_sp omni_cfgp``: one call for each, in one process.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from functools import partial

import torch.distributed as dist
from run_strategy import compare, planned
from toy_pipeline import Pipeline

import omni_parallel
from omni_parallel_state import destroy_distributed_environment, init_distributed_environment

LAYOUTS = {
    "omni_sp": "ulysses",
    "omni_cfgp": "cfg",
    "omni_pp": "pp",
    "omni_hsdp": "hsdp",
    "omni_vae_patch": "vae_patch",
}


def main(present: list[str]) -> None:
    """Draw with each of the strategies."""
    init_distributed_environment(backend="gloo", timeout=timedelta(seconds=60))
    ranks = dist.get_world_size()
    for package in present:
        pipeline = Pipeline() if package != "omni_sp" else planned(Pipeline())
        layout = f"{LAYOUTS[package]}={ranks}"
        compare(package, pipeline, partial(omni_parallel.parallelize, pipeline, layout))
    destroy_distributed_environment()


if __name__ == "__main__":
    main(sys.argv[1:])
