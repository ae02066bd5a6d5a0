"""``omni-parallel generate``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_parallel.generate.output import check_output
from omni_parallel.generate.rank import generate_rank
from omni_parallel.launching.failures import first_failure
from omni_parallel.launching.hosts import device_for, nodes_for, ranks_here
from omni_parallel.launching.processes import Nodes, run_ranks
from omni_parallel.pipeline_request import DTYPES, PipelineRequest, parse_size
from omni_parallel.v1 import ModelFacts, ParallelConfig, validate


@click.command()
@click.argument("model")
@click.option("--prompt", "prompts", multiple=True, required=True, help="May be repeated.")
@click.option("--negative-prompt", help="What guidance leads away from.")
@click.option("--guidance", type=float, help="Its scale.  [default: the pipeline's]")
@click.option("--layout", default="auto", show_default=True, help="What the ranks share.")
@click.option("--nproc", type=click.IntRange(1), help="Ranks on this host.")
@click.option("--nnodes", type=click.IntRange(1), default=1, show_default=True, help="Hosts.")
@click.option("--rdzv-endpoint", metavar="HOST:PORT", help="Where hosts meet: one of them.")
@click.option("--steps", type=click.IntRange(1), help="[default: the pipeline's]")
@click.option("--size", metavar="WIDTHxHEIGHT", help="Pixels.  [default: the pipeline's]")
@click.option("--frames", type=click.IntRange(1), help="Of a video.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), help="[default: bfloat16; float32 on the CPU]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("omni-parallel.png"),
    show_default=True,
    help="File: .png, .jpg, .webp; of a video .gif or .mp4.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def generate(**given: Any) -> None:
    """Generate images or videos with MODEL on several ranks.

    MODEL is a folder that a pipeline of diffusers was saved to, or its name on the hub. On several
    hosts, give the same command on each of them; the first rank's host has the files.
    """
    try:
        request, ranks, nodes = _asked(given)
    except ParallelConfigError as error:
        raise click.UsageError(str(error)) from None
    args = (request, given["layout"], given["out"].absolute(), device_for(ranks))
    others = dict.fromkeys(range(1, ranks), Std.ALL)
    with tempfile.TemporaryDirectory(prefix="omni-parallel-") as folder:
        logs = DefaultLogsSpecs(folder, redirects=Std.ALL if given["as_json"] else others)
        try:
            found = run_ranks(generate_rank, args, ranks, logs, nodes=nodes)
        except ChildFailedError as error:
            raise ParallelError(first_failure(error)) from None
    files = [file for rank in sorted(found) for file in found[rank]]
    if given["as_json"]:
        click.echo(json.dumps({"files": files, "ranks": ranks * nodes.count}))
        return
    for file in files:
        Console().print(f"wrote {file}", highlight=False, soft_wrap=True)


def _asked(given: dict[str, Any]) -> tuple[PipelineRequest, int, Nodes]:
    """Everything that can be known before a rank starts.

    Raises:
        ParallelConfigError: It cannot work.
    """
    check_output(given["out"])
    nodes = nodes_for(given["nnodes"], given["rdzv_endpoint"], "generate")
    config = None if given["layout"] == "auto" else ParallelConfig.of(given["layout"])
    needed = 0 if config is None else config.ranks
    ranks = ranks_here(given["nproc"], needed, nodes.count) or 1
    width, height = parse_size(given["size"])
    folder = Path(given["model"])
    if folder.exists() and config is not None:
        known = None if width is None or height is None else (width, height, given["frames"] or 1)
        validate(config, ranks * nodes.count, ModelFacts.from_folder(folder), known)
    elif folder.exists():
        ModelFacts.from_folder(folder)
    elif config is not None:
        validate(config, ranks * nodes.count)
    request = PipelineRequest(
        model=given["model"],
        prompts=given["prompts"],
        negative_prompt=given["negative_prompt"],
        guidance=given["guidance"],
        steps=given["steps"],
        width=width,
        height=height,
        frames=given["frames"],
        seed=given["seed"],
        dtype=given["dtype"] or ("bfloat16" if device_for(ranks) is None else "float32"),
        output_type="pil",
    )
    return request, ranks, nodes
