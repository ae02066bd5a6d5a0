"""The cases of the benchmark of autoencoders, and what each rank does in one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from bench.harness import Progress, process_group
from bench.models import twin
from bench.race import from_all_ranks
from bench.ready import Ready, make_ready, race_all
from bench.results import Measured
from bench.vae_contestants import DISTVAE, RANKS, VaeContestant
from bench.vae_counts import LiveBytes, Purposes, minus
from bench.vae_models import AUTOENCODERS, build_vae, latent_of
from bench.vae_results import DecodeMeasured, DecodeResult, DecodeTraffic, Sent
from omni_group_coordinator import record_traffic
from omni_parallel.plan.convolutions import Convolved, convolutions_of, halo_bytes

WARM_UP: Final = 1
"""Decodes by each contestant before it is counted, and then timed."""


@dataclass(frozen=True)
class DecodeCase:
    """One row of the benchmark.

    Attributes:
        family: Of `bench.vae_models.AUTOENCODERS`.
        height: Pixels.
        width: Likewise.
        frames: Of a video.
        batch: Samples. torch convolves a batch of two by the same kernels whatever the size; of
            one sample the whole and a half of it may be on different sides of a threshold.
    """

    family: str
    height: int
    width: int
    frames: int = 1
    batch: int = 2

    @property
    def name(self) -> str:
        """What ``--rows`` calls it."""
        return f"{self.family}-{self.height}{f'x{self.frames}' if self.frames > 1 else ''}"

    @property
    def title(self) -> str:
        """What tables call it."""
        of = f"{self.height} × {self.width}"
        what = f"video of {self.frames} × {of}" if self.frames > 1 else f"image of {of}"
        count = what.replace(" of", "s of", 1) if self.batch > 1 else what
        return f"{AUTOENCODERS[self.family].title}, {self.batch} {count}"

    @property
    def remark(self) -> str:
        """What a reader of the numbers should know."""
        if self.batch == 1:
            return ""
        return (
            f"{self.batch} samples at once, so that torch's CPU kernels are the same for the whole "
            "and for parts"
        )


CASES: Final = {
    case.name: case
    for case in (
        DecodeCase("kl", 256, 256),
        DecodeCase("kl", 1024, 1024, batch=1),
        DecodeCase("wan", 480, 832, frames=5),
    )
}
LONG_CASES: Final = {case.name: case for case in (DecodeCase("wan", 480, 832, frames=17),)}


@torch.no_grad()
def race_case(
    progress: Progress, case: DecodeCase, contestants: Sequence[VaeContestant], rounds: int
) -> DecodeResult:
    """Run a case; every rank calls it."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    with process_group():
        stock = build_vae(case.family)
        latent = latent_of(case.family, case.batch, case.frames, case.height, case.width)

        def single() -> Tensor:
            return _decode(stock, latent)

        with convolutions_of(stock) as calls:
            reference = single()
        with LiveBytes() as live:
            single()
        progress.step(2)
        ready = []
        for contestant in contestants:
            ready.append(_prepare(case, stock, latent, contestant, reference, calls))
            progress.step()
        raced = race_all(single, ready, rounds, progress.step)
    return DecodeResult(
        case=case.title,
        ranks=RANKS,
        rival=DISTVAE,
        single=raced.single,
        together=raced.together,
        measured=raced.measured,
        core_share=raced.core_share,
        counted="decode",
        memory=live.peak,
        reaching=sum(call.reaches for call in calls),
        remark=case.remark,
    )


def _decode(vae: Any, latent: Tensor) -> Tensor:
    sample: Tensor = vae.decode(latent, return_dict=False)[0]
    return sample


def _prepare(
    case: DecodeCase,
    stock: nn.Module,
    latent: Tensor,
    contestant: VaeContestant,
    reference: Tensor,
    calls: Sequence[Convolved],
) -> Ready:
    vae, expected = twin(stock), contestant.own(reference)

    def run() -> Tensor:
        return contestant.run(vae, latent)

    ready = make_ready(
        DecodeMeasured(contestant.name, contestant.side, mode=contestant.mode),
        lambda: contestant.apply(vae, case.family, latent),
        lambda: (run, None),
        expected,
        warm_up=WARM_UP,
        alone=contestant.alone,
    )
    if ready.run is not None:
        ready.measured = _counted(vae, run, contestant, calls, expected, ready.measured)
    return ready


def _counted(
    vae: Any,
    run: Callable[[], Tensor],
    contestant: VaeContestant,
    calls: Sequence[Convolved],
    expected: Tensor,
    before: Measured,
) -> DecodeMeasured:
    """Decode once more, and count what is alive and what is sent, on the rank that has most."""
    norms = [m for m in vae.modules() if isinstance(m, nn.GroupNorm)]
    with (
        record_traffic() as recording,
        Purposes(recording, [vae.decoder]) as decoder,
        Purposes(recording, norms) as norm,
        LiveBytes() as live,
    ):
        output = run()
    halos = Sent(recording.bytes_sent["halo"], recording.calls["halo"])
    traffic = DecodeTraffic(
        halos=_most(halos),
        formula=0 if contestant.dim is None else halo_bytes(calls, contestant.dim, RANKS),
        norms=_most(norm.inside),
        attention=_most(minus(decoder.inside, halos, norm.inside)),
        result=_most(minus(decoder.total(), decoder.inside)),
    )
    return DecodeMeasured(
        before.name,
        before.side,
        error=before.error,
        problem=before.problem,
        mode=contestant.mode,
        memory=max(from_all_ranks(live.peak)),
        psnr=psnr(output, expected),
        sent=traffic if contestant.counts_traffic else None,
        wire=None if contestant.alone else _most(live.wire),
    )


def _most(sent: Sent) -> Sent:
    everyone = from_all_ranks(sent)
    return Sent(max(each.bytes for each in everyone), max(each.calls for each in everyone))


def psnr(output: Tensor, reference: Tensor) -> float | None:
    """Over the outputs of all ranks; the peak is the range of the reference. None if equal."""
    square = (output - reference).double().square().mean().item()
    lowest, highest = reference.min().item(), reference.max().item()
    squares, lows, highs = zip(*from_all_ranks((square, lowest, highest)), strict=True)
    error = sum(squares) / len(squares)
    return 10 * math.log10((max(highs) - min(lows)) ** 2 / error) if error else None
