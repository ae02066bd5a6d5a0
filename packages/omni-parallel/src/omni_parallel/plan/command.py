"""``omni-parallel plan``."""

from __future__ import annotations

from typing import Any

import click

from omni_parallel.plan.gpu_types import GPU_TYPES
from omni_parallel.plan.machine import Machine
from omni_parallel.reported_command import Outcome, ReportedCommand

_POSITIVE = click.FloatRange(0, min_open=True)
_SHARE = click.FloatRange(0, 1, min_open=True)
_KNOWN = ", ".join(gpu.name for gpu in GPU_TYPES)


def _complete_gpu(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return [gpu.name for gpu in GPU_TYPES if gpu.name.startswith(incomplete.lower())]


@click.command(cls=ReportedCommand)
@click.argument("model")
@click.option("--gpus", type=click.IntRange(1, 4096), required=True, help="Ranks, on all hosts.")
@click.option(
    "--gpu",
    required=True,
    metavar="TYPE",
    help=f"One of: {_KNOWN}.",
    shell_complete=_complete_gpu,
)
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="Hosts.")
@click.option("--width", type=click.IntRange(1), help="Pixels.  [default: the pipeline's]")
@click.option("--height", type=click.IntRange(1), help="Pixels.  [default: the pipeline's]")
@click.option("--frames", type=click.IntRange(1), help="Of a video.  [default: the pipeline's]")
@click.option("--steps", type=click.IntRange(1), help="[default: the pipeline's]")
@click.option("--text-tokens", type=click.IntRange(1), help="[default: the pipeline's most]")
@click.option("--guidance/--no-guidance", default=None, help="[default: as the model is used]")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16"]),
    default="bfloat16",
    show_default=True,
    help="Of weights and computing.",
)
@click.option("--tflops", type=_POSITIVE, help="Dense peak of the accelerator in the dtype.")
@click.option("--memory", type=_POSITIVE, metavar="GB", help="Of an accelerator.")
@click.option("--bandwidth", type=_POSITIVE, metavar="GB/s", help="Of its memory.")
@click.option("--link", type=_POSITIVE, metavar="GB/s", help="Within a host, one way.")
@click.option("--node-link", type=_POSITIVE, metavar="GB/s", help="Between hosts, for each.")
@click.option("--efficiency", type=_SHARE, default=Machine.efficiency, show_default=True)
@click.option("--link-efficiency", type=_SHARE, default=Machine.link_efficiency, show_default=True)
@click.option("--all", "every", is_flag=True, help="All legal layouts, those too large as well.")
def plan(**given: Any) -> Outcome:
    """Predict bytes, memory and time of every legal layout of MODEL.

    MODEL is a folder that a pipeline or a transformer of diffusers was saved to, or its name on the
    hub. Only its configuration is read; nothing runs, and no accelerator is needed.
    """
    from rich.console import Console

    from omni_group_coordinator import ParallelConfigError
    from omni_parallel.plan.planning import planned

    console = Console(stderr=given["as_json"], markup=False, emoji=False)
    try:
        found = planned(given, console)
    except ParallelConfigError as error:
        raise click.UsageError(str(error)) from None
    every = given["every"]
    if not given["as_json"]:
        console.print(found.about(), highlight=False, soft_wrap=True)
        console.print(found.table(every=every))
        left_out = None if every else found.left_out()
        for text in ([left_out] if left_out else []) + found.assumptions():
            console.print(f"- {text}", highlight=False, soft_wrap=True)
    return Outcome(found.to_dict(every=every))
