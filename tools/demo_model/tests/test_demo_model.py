"""The shipped model draws what it is asked for; the renderer, the grammar and the check agree."""

import json
import random
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from demo_model.export import Sampling, generate, load
from demo_model.flow import Conditioned
from demo_model.grammar import Request, Thing, parse, random_request
from demo_model.reading import NOTHING, PLACES, answers, worded
from demo_model.reading import train as read
from demo_model.score import check
from demo_model.shapes import compose, render
from demo_model.text import LENGTH, clip_tokenizer, t5_tokenizer

MODEL = Path(__file__).resolve().parents[3] / "packages/omni-parallel/src/omni_parallel/demo/model"
LIMIT_BYTES = 12 * 1024**2
CAPTIONS = [
    "a red circle left of a blue square",
    "a green triangle above a yellow star",
    "a purple circle on a dark background",
    "an orange ring right of a cyan cross",
]


def _drawn(request: Request, seed: int, height: int = 128, width: int = 128) -> Image.Image:
    picture = render([compose(request, random.Random(seed))], height, width)[0]
    values = ((picture + 1) * 127.5).round().clamp(0, 255).byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    """Return the shipped model, loaded as a caller would."""
    return load(MODEL)


@pytest.fixture(scope="module")
def problems(pipeline: FluxPipeline) -> list[tuple[str, ...]]:
    """Return what the check finds wrong with the shipped model's pictures of `CAPTIONS`."""
    pictures = generate(pipeline, CAPTIONS, Sampling(steps=16))
    return [check(*pair).problems for pair in zip(pictures, CAPTIONS, strict=True)]


def test_model_draws_the_colours_that_captions_say(problems: list[tuple[str, ...]]) -> None:
    """Each colour asked for is there, no other is, and the background is right."""
    wrong = [p for each in problems for p in each if p.startswith(("there is", "the background"))]
    assert wrong == []


def test_model_draws_what_captions_say(problems: list[tuple[str, ...]]) -> None:
    """Colours, shapes, places and background all come out as asked."""
    assert problems == [()] * len(CAPTIONS)


def test_model_draws_other_sizes(pipeline: FluxPipeline) -> None:
    """Height and width are taken as asked."""
    picture = generate(pipeline, CAPTIONS[:1], Sampling(steps=4, size=(128, 192)))[0]
    assert picture.size == (192, 128)


def test_guidance_changes_the_picture(pipeline: FluxPipeline) -> None:
    """The negative prompt takes part: another guidance scale gives another picture."""
    first, second = (
        generate(pipeline, CAPTIONS[:1], Sampling(steps=4, scale=scale))[0] for scale in (1.5, 4.0)
    )
    assert first.tobytes() != second.tobytes()


def test_unknown_words_do_not_fail(pipeline: FluxPipeline) -> None:
    """Words outside the grammar are the unknown token."""
    picture = generate(pipeline, ["Ein Hund, 3 Katzen & ein é"], Sampling(steps=1))[0]
    assert picture.size == (128, 128)


def test_model_is_small() -> None:
    """The folder travels inside a wheel."""
    sizes = [path.stat().st_size for path in MODEL.rglob("*") if path.is_file()]
    assert 0 < sum(sizes) <= LIMIT_BYTES


@pytest.mark.parametrize(("height", "width"), [(96, 96), (128, 128), (128, 192), (256, 256)])
def test_check_accepts_rendered_pictures(height: int, width: int) -> None:
    """What the renderer draws for a caption passes the check for it, at any size."""
    rng = random.Random(height + width)
    for seed in range(25):
        request = random_request(rng)
        picture = _drawn(request, seed, height, width)
        assert check(picture, request.text(rng)).problems == (), request.text()


def test_check_rejects_other_captions() -> None:
    """A picture does not pass for a caption with other objects or another order."""
    rng = random.Random(0)
    for seed in range(40):
        request, other = random_request(rng), random_request(rng)
        if request.things != other.things:
            assert not check(_drawn(request, seed), other.text()).passed
    red = Thing(colour="red", shape="circle")
    blue = Thing(colour="blue", shape="square")
    picture = _drawn(Request(things=(red, blue), relation="left"), 0)
    assert not check(picture, Request(things=(blue, red), relation="left").text()).passed
    assert check(picture, Request(things=(blue, red), relation="right").text()).passed


def test_wordings_mean_what_they_were_made_from() -> None:
    """Parsing a caption, whatever the synonyms, gives back the request."""
    rng = random.Random(1)
    for _ in range(300):
        request = random_request(rng)
        assert parse(request.text(rng)) == request


def test_parse_names_the_grammar() -> None:
    """A caption outside the grammar is refused with an example."""
    with pytest.raises(ValueError, match="a red circle left of a blue square"):
        parse("a photograph of a dog")


def test_rendering_is_reproducible() -> None:
    """The same seed gives the same picture."""
    request = parse("a small red star above a large green ring on a dark background")
    first, second = (render([compose(request, random.Random(5))]) for _ in range(2))
    assert torch.equal(first, second)
    assert first.min() >= -1
    assert first.max() <= 1


def test_readers_are_asked_what_the_caption_says() -> None:
    """Each word of an object is labelled with that object and its place; other words are not."""
    request = parse("a small red star above a blue ring")
    caption, owners = worded(request, random.Random(2))
    assert owners == [0, 0, 0, 0, -1, 1, 1, 1]
    assert caption.rstrip(".").lower() == request.text()
    words, pooled = answers(request, owners)
    assert len(words["place"]) == LENGTH
    top, bottom = PLACES.index("top"), PLACES.index("bottom")
    assert words["place"][:8] == [top, top, top, top, NOTHING, bottom, bottom, bottom]
    assert pooled["top size"] == 1
    assert pooled["left size"] == 3  # nothing stands there


def test_encoders_learn_to_read_and_a_stopped_run_goes_on(tmp_path: Path) -> None:
    """The loss of the first phase falls, and a second run starts where the first one ended."""
    tokenizers = clip_tokenizer(), t5_tokenizer()
    torch.set_num_threads(1)
    read(tmp_path, 50, Conditioned(tokenizers), tokenizers)
    read(tmp_path, 100, Conditioned(tokenizers), tokenizers)
    first, second = map(json.loads, (tmp_path / "reading.jsonl").read_text().splitlines())
    assert (first["step"], second["step"]) == (50, 100)
    assert second["loss"] < first["loss"]
