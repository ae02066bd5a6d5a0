"""Generating on ranks that torch's elastic agent or Ray starts."""

from __future__ import annotations

import tempfile
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from omni_group_coordinator import ParallelConfigError
from omni_parallel.generate.output import check_format, check_output, save
from omni_parallel.generate.rank import generate_rank
from omni_parallel.known_pipeline import KnownPipeline
from omni_parallel.launching.failures import rank_failure
from omni_parallel.launching.hosts import accelerators, device_for, nodes_for, ranks_here
from omni_parallel.launching.processes import Nodes, run_ranks
from omni_parallel.launching.ray_cluster import ray_cluster
from omni_parallel.pipeline_request import PipelineRequest, parse_size
from omni_parallel.v1 import ModelFacts, ParallelConfig, load_strategy, validate


def generated(given: dict[str, Any]) -> dict[str, Any]:
    """Generate what the options of the command ask for.

    Returns:
        The files that this host has, and on how many ranks they were made.

    Raises:
        ParallelConfigError: It cannot work; no rank has started.
        ParallelError: A rank failed; every one has ended.
    """
    check_output(given["out"])
    config = None if given["layout"] == "auto" else ParallelConfig.of(given["layout"])
    known = KnownPipeline.find(given["model"])
    run = _with_ray if given["launcher"] == "ray" else _with_torch
    ranks, files = run(given, config, known)
    return {"model": given["model"], "layout": given["layout"], "ranks": ranks, "files": files}


def _with_torch(
    given: dict[str, Any], config: ParallelConfig | None, known: KnownPipeline
) -> tuple[int, list[str]]:
    nodes = nodes_for(given["nnodes"], given["rdzv_endpoint"], "generate")
    ranks = ranks_here(given["nproc"], 0 if config is None else config.ranks, nodes.count) or 1
    device = device_for(ranks)
    request = _request(given, device)
    _check_layout(given, config, ranks * nodes.count, known.facts)
    _check_call(given, request, known)
    args = (request, given["layout"], given["out"].absolute(), device)
    found = _run_torch(args, ranks, nodes, given["as_json"])
    return ranks * nodes.count, [file for rank in sorted(found) for file in found[rank]]


def _run_torch(
    args: tuple[object, ...], ranks: int, nodes: Nodes, quiet: bool
) -> dict[int, list[str]]:
    """Rank 0 has the terminal: its progress is on standard error."""
    redirects = dict.fromkeys(range(1, ranks), Std.ALL) | ({0: Std.OUT} if quiet else {})
    with tempfile.TemporaryDirectory(prefix="omni-parallel-") as folder:
        try:
            logs = DefaultLogsSpecs(folder, redirects=redirects)
            return run_ranks(generate_rank, args, ranks, logs, nodes=nodes)
        except ChildFailedError as error:
            raise rank_failure(error) from None


def _with_ray(
    given: dict[str, Any], config: ParallelConfig | None, known: KnownPipeline
) -> tuple[int, list[str]]:
    if given["nnodes"] > 1 or given["rdzv_endpoint"] is not None:
        msg = "Ray knows its hosts; with --launcher ray leave --nnodes and --rdzv-endpoint out"
        raise ParallelConfigError(msg)
    asked = given["nproc"] or (0 if config is None else config.ranks)
    if asked:
        _check_layout(given, config, asked, known.facts)
    _check_call(given, _request(given, None), known)
    with ray_cluster(asked or accelerators() or 1) as cluster:
        ranks = asked or cluster.accelerators or 1
        device = None if cluster.accelerators >= ranks else "cpu"
        if not asked:
            _check_layout(given, config, ranks, known.facts)
        args = (_request(given, device), given["layout"], None, device)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            progress.add_task(f"{ranks} ranks on Ray: {given['layout']}", total=None)
            found = cluster.run(generate_rank, args, ranks, device)
    return ranks, [str(path) for path in save(found[0], given["out"].absolute())]


def _check_call(given: dict[str, Any], request: PipelineRequest, known: KnownPipeline) -> None:
    """Whether the pipeline takes what it is asked for, and makes what the file is for."""
    known.check(request)
    check_format(given["out"], known.makes_videos)
    note = known.size_note(request.width, request.height)
    if note is not None:
        Console(stderr=True).print(note, markup=False, highlight=False, soft_wrap=True)


def _check_layout(
    given: dict[str, Any], config: ParallelConfig | None, ranks: int, facts: ModelFacts
) -> None:
    width, height = parse_size(given["size"])
    if config is None:
        return
    size = None if width is None or height is None else (width, height, given["frames"] or 1)
    validate(config, ranks, facts, size)
    for name in config.strategies():
        load_strategy(name)  # which refuses packages of another line


def _request(given: dict[str, Any], device: str | None) -> PipelineRequest:
    width, height = parse_size(given["size"])
    return PipelineRequest(
        model=given["model"],
        prompts=given["prompts"],
        negative_prompt=given["negative_prompt"],
        guidance=given["guidance"],
        steps=given["steps"],
        width=width,
        height=height,
        frames=given["frames"],
        seed=given["seed"],
        dtype=given["dtype"] or ("bfloat16" if device is None else "float32"),
        output_type="pil",
    )
