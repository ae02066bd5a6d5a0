"""The page for who comes from diffusers or xDiT names options that there are, on both sides."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from omni_hsdp import HSDPInferenceConfig
from omni_parallel import ParallelConfig
from omni_pp import PipeFusionConfig, PipelineParallelConfig
from omni_sp import SequenceParallelConfig

PAGE = (Path(__file__).parents[1] / "docs" / "coming-from.md").read_text(encoding="utf-8")
LAYOUTS = re.findall(r"`((?:[a-z_]+=(?:[nm2]|tile),?)+)`", PAGE)
OPTIONS = re.findall(r"`options=(\{\"\w+\": \{.*?\}\})`", PAGE)
TAKEN: dict[str, tuple[Any, tuple[str, ...]]] = {
    "sp": (SequenceParallelConfig, ()),
    "pp": (PipelineParallelConfig, ()),
    "pipefusion": (PipeFusionConfig, ()),
    "hsdp": (HSDPInferenceConfig, ("text_encoders",)),
}


def test_the_page_has_layouts_and_options() -> None:
    assert len(LAYOUTS) > 10
    assert len(OPTIONS) > 4


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS)))
def test_layouts_are_read(layout: str) -> None:
    assert ParallelConfig.parse(re.sub(r"=[nm]\b", "=2", layout)) != ParallelConfig()


@pytest.mark.parametrize("options", sorted(set(OPTIONS)))
def test_options_are_fields_of_the_strategies(options: str) -> None:
    value = ast.literal_eval(re.sub(r"\b([mka])\b(?=[,}])", "1", options))
    ((strategy, given),) = value.items()
    config, more = TAKEN[strategy]
    assert set(given) <= {one.name for one in fields(config)} | set(more)


def test_every_option_of_diffusers_has_its_row() -> None:
    parallel = pytest.importorskip("diffusers.models._modeling_parallel")
    for kind in (parallel.ContextParallelConfig, parallel.TensorParallelConfig):
        for one in fields(kind):
            if not one.name.startswith("_"):
                assert re.search(rf"^\| [^|]*\b{one.name}\b", PAGE, re.MULTILINE), one.name
