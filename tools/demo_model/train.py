"""All phases in order, from nothing to a saved and measured pipeline."""

from pathlib import Path
from typing import Final

import click
import torch
from diffusers import FluxPipeline
from rich.console import Console

from demo_model import autoencoder, export, flow, reading, text
from demo_model.measure import Result, measure, unseen_requests
from demo_model.pool import NATIVE, load_pool, statistics

AUTOENCODER_STEPS: Final = 1300
READING_STEPS: Final = 600
PICTURES: Final = 10_000
DRAWING_STEPS: Final = 2500
DECODER_STEPS: Final = 450


def _report(console: Console, results: list[Result]) -> None:
    failures = [result for result in results if result.problems]
    for result in failures:
        console.print(f"[red]{result.caption}[/red]: {'; '.join(result.problems)}")
    console.print(f"{len(results) - len(failures)} of {len(results)} pictures show their caption.")


def _save(pipeline: FluxPipeline, out: Path) -> None:
    pipeline.save_pretrained(out)
    for weights in out.rglob("*.safetensors"):
        weights.chmod(0o644)  # safetensors makes them readable to their owner alone
    captions = list(export.SAMPLES)
    pictures = export.generate(export.load(out), captions, export.Sampling())
    export.sheet(pictures, captions).quantize(128).save(out / "samples.png", optimize=True)


def make(out: Path, work: Path, console: Console, steps: int) -> None:
    """Run every phase that is not yet done in `work` and save the pipeline to `out`."""
    tokenizers = text.clip_tokenizer(), text.t5_tokenizer()
    vae = autoencoder.train(work, AUTOENCODER_STEPS)
    model = flow.Conditioned(tokenizers)
    reading.train(work, READING_STEPS, model, tokenizers)
    pool = load_pool(work, vae, tokenizers, NATIVE, PICTURES)
    normal = statistics(pool)
    console.print(f"latents: mean {normal[0]:.4f}, deviation {normal[1]:.4f}")
    average = flow.train(work, steps, model, pool, tokenizers, normal)
    autoencoder.refine_decoder(work, vae, DECODER_STEPS)
    _save(export.assemble(vae, normal, tokenizers, model, average), out)


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder to save the pipeline to.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out/demo_model"),
    show_default=True,
    help="Folder for checkpoints and pools; a second run continues from it.",
)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=DRAWING_STEPS,
    show_default=True,
    help="Steps of the transformer. With more of them a finished model trains on.",
)
@click.option("--measure-only", is_flag=True, help="Only measure the pipeline in --out.")
def main(out: Path, work: Path, threads: int, steps: int, measure_only: bool) -> None:
    """Train the demonstration model from nothing and measure it."""
    torch.set_num_threads(threads)
    console = Console()
    try:
        if not measure_only:
            work.mkdir(parents=True, exist_ok=True)
            make(out, work, console, steps)
        _report(
            console, measure(export.load(out), unseen_requests(100), export.Sampling(seed=1000))
        )
    except KeyboardInterrupt:
        console.print(f"Stopped. The same command continues from {work}.")
        raise SystemExit(130) from None
