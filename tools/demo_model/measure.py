"""Measures how many held-out captions a saved pipeline draws correctly."""

import random
from dataclasses import dataclass, replace

from diffusers import FluxPipeline
from PIL import Image
from rich.progress import track

from demo_model.export import Sampling, generate
from demo_model.grammar import Request, random_request
from demo_model.score import check


@dataclass(frozen=True, kw_only=True)
class Result:
    """One picture and what is wrong with it."""

    caption: str
    picture: Image.Image
    problems: tuple[str, ...]


def unseen_requests(count: int, *, seed: int = 7) -> list[Request]:
    """Draw requests: four in five are pairs that training left out, the rest single objects."""
    rng = random.Random(seed)
    singles = count // 5
    requests = [random_request(rng, pairs=0.0) for _ in range(singles)]
    while len(requests) < count:
        request = random_request(rng, pairs=1.0)
        requests += [request] if request.held_out() else []
    return requests


def measure(
    pipeline: FluxPipeline, requests: list[Request], sampling: Sampling, *, batch: int = 10
) -> list[Result]:
    """Draw each request once and check the pictures."""
    results = []
    for start in track(range(0, len(requests), batch), "measuring"):
        captions = [request.text() for request in requests[start : start + batch]]
        each = replace(sampling, seed=sampling.seed + start)
        results += [
            Result(caption=caption, picture=picture, problems=check(picture, caption).problems)
            for caption, picture in zip(captions, generate(pipeline, captions, each), strict=True)
        ]
    return results
