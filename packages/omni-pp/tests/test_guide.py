"""The guide's and the README's examples work, and their tables say what the code does."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "stages"))

from toy_stages import ToyPipeline, ToyTransformer, alone, close, guided, request

import omni_parallel_state.checkpoints
import omni_pp
from omni_parallel_state import ParallelLayout, ParallelState
from omni_pp import PipelineParallelConfig
from omni_pp.partition.families import BLOCK_INDEXED_ARGUMENTS, REFUSED
from rank_harness import RankPool

_HERE = Path(__file__).parent
GUIDE = _HERE.parents[2] / "docs" / "guides" / "pipeline-stages.md"
README = _HERE.parent / "README.md"


def example(name: str) -> dict[str, Any]:
    """What an example of the guide defines."""
    pattern = rf"<!-- example:{name} -->\n```python\n(.*?)```"
    (code,) = re.findall(pattern, GUIDE.read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code, scope)
    return scope


def rows(text: str, name: str) -> list[list[str]]:
    """The cells of a table between two marks, without its head."""
    part = text.split(f"<!-- {name}:begin -->")[1].partition(f"<!-- {name}:end -->")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("text", [GUIDE, README], ids=["guide", "readme"])
def test_every_example_is_python_and_imports_what_there_is(text: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", text.read_text(), re.DOTALL)
    assert len(blocks) == (6 if text is GUIDE else 2)
    for block in blocks:
        compile(block, str(text), "exec")
        for line in re.findall(r"^from omni_\S+ import .+$", block, re.MULTILINE):
            exec(line, {})


@torch.no_grad()
def follow_the_guide() -> tuple[int, int]:
    pipeline, state = ToyPipeline(), ParallelState(ParallelLayout(pp=2))
    with state.use():
        close(example("draw")["draw"](pipeline, **guided()).sample, alone(guided()))
        results = example("together")["draw_all"](pipeline, [guided(0), request(1)])
        for result, arguments in zip(results, (guided(0), request(1)), strict=True):
            close(result.sample, alone(arguments))
    whole = sum(p.nbytes for p in pipeline.transformer.parameters())
    call = lambda: pipeline(**request(2, steps=1))  # noqa: E731
    with example("measured")["cut"](pipeline, call, state) as handle:
        close(pipeline(**guided(3)).sample, alone(guided(3)))
        held, promised = example("memory")["held"](handle)
        assert held < whole
    assert sum(p.nbytes for p in pipeline.transformer.parameters()) == whole
    return held, promised


@torch.no_grad()
def load_as_the_guide_does(folder: Path) -> None:
    state = ParallelState(ParallelLayout(pp=2))
    arguments = guided(0)
    draw = example("loaded")["draw_loaded"]
    result = draw(ToyPipeline, ToyTransformer, folder, arguments.pop("prompt"), state, **arguments)
    close(result.sample, alone(guided(0)))


def test_the_example_of_loading_works(ranks: RankPool, tmp_path: Path) -> None:
    files = pytest.importorskip("safetensors.torch")
    files.save_file(ToyTransformer().state_dict(), tmp_path / "model.safetensors")
    ranks.run(load_as_the_guide_does, tmp_path)


def test_the_examples_of_the_guide_work(ranks: RankPool) -> None:
    for held, promised in ranks.run(follow_the_guide):
        assert held == promised


def as_fast(stages: int, micro_batches: int, virtual: int) -> float:
    """Over one process, by working a step off: each chunk when its rank and its input are there."""
    free, ready = [0] * stages, [0] * micro_batches
    for chunk in range(stages * virtual):
        for one in range(micro_batches):
            ready[one] = free[chunk % stages] = max(free[chunk % stages], ready[one]) + 1
    return micro_batches * stages * virtual / max(ready)


def test_speed_ups_are_those_of_the_schedule() -> None:
    columns = ((2, 1), (2, 2), (2, 4), (3, 1), (4, 1))
    found = rows(GUIDE.read_text(), "speed-ups")
    assert len(found) == 4
    for _, count, *numbers in found:
        expected = [as_fast(stages, int(count), virtual) for stages, virtual in columns]
        assert numbers == [f"{number:.2f}" for number in expected]
    readme = re.findall(r"\| (\d\.\d\d) × \|", README.read_text())
    expected = [as_fast(2, *case) for case in ((1, 1), (2, 1), (2, 2), (4, 1))]
    assert [float(number) for number in readme] == [*(round(n, 2) for n in expected), 2.0]


def test_every_option_of_the_guide_is_one() -> None:
    text = GUIDE.read_text().split("## How a model is cut")[1].split("## What fills")[0]
    options = re.findall(r"^\| `(\w+=[^`]+)`", text, re.MULTILINE)
    assert len(options) == 6
    for option in options:
        eval(f"Config({option.replace(', …', '')})", {"Config": PipelineParallelConfig})


def test_everything_that_is_refused_by_name_is_in_the_guide() -> None:
    text = GUIDE.read_text()
    listed = re.findall(r"`(\w+)`", text.split("refused:begin")[1].split("refused:end")[0])
    assert sorted(listed) == sorted(REFUSED)
    for name in BLOCK_INDEXED_ARGUMENTS:
        assert f"`{name}`" in text, name


def test_every_error_of_the_guide_is_one() -> None:
    text = GUIDE.read_text().split("### Errors")[1].partition("\n## ")[0]
    said = re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)
    code = "\n".join(
        path.read_text()
        for package in (omni_pp, omni_parallel_state.checkpoints)
        for path in Path(str(package.__file__)).parent.rglob("*.py")
    )
    plain = re.sub(r'"\s*\n\s*f?"', "", code)  # messages go over several lines
    assert len(said) == 14
    for message in said:
        parts = [part.strip() for part in re.split(r"…|\d+", message) if len(part.strip()) > 6]
        assert parts, message
        for part in parts:
            assert part in plain, part


def test_the_table_of_pipelines_lists_every_class_that_is_tested() -> None:
    pytest.importorskip("diffusers")
    path = _HERE / "stages" / "test_stock_pipelines.py"
    spec = importlib.util.spec_from_file_location("pp_stock_pipelines", path)
    assert spec is not None
    assert spec.loader is not None
    tested = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tested)
    found = [type(tested.CASES[name].build()).__name__ for name in tested.LISTED + tested.OTHERS]
    table = rows(GUIDE.read_text(), "pipelines")
    listed = [name.strip("`") for name, _ in table]
    assert sorted(listed) == sorted(Counter(found))
    assert f"{len(listed)} pipeline classes" in README.read_text()
    first = [name.strip("`") for name, more in table if more.startswith("three stages, virtual")]
    assert first == found[: len(tested.LISTED)]
