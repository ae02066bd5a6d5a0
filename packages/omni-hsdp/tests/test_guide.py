"""The guide's examples work, and its tables say what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from toy_sharded import equal, seeded, sharing, toy

from omni_hsdp import find_blocks, hsdp_report, ignored
from omni_parallel_state.checkpoints import files

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "sharded-weights.md"


def example(name: str) -> dict[str, Any]:
    """What an example of the guide defines."""
    pattern = rf"<!-- example:{name} -->\n```python\n(.*?)```"
    (code,) = re.findall(pattern, GUIDE.read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code, scope)
    return scope


def test_every_example_is_python():
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        compile(block, str(GUIDE), "exec")


def test_the_blocks_of_the_guide_are_found():
    assert example("blocks")["blocks"] == ["layers.0", "layers.1"]


class Pipeline:
    """Calls its transformer twice for a picture, and can add to its weights."""

    def __init__(self) -> None:
        self.transformer = toy()
        self.text_encoder = toy(2, seed=9)
        self.loaded: dict[str, torch.Size] = {}

    def __call__(self, prompt: str, output_type: str) -> Any:
        x = self.text_encoder(seeded(2, 6))[:, :1].expand(2, 6)
        for _ in range(2):
            x = self.transformer(x)[:, :1].expand(2, 6)
        return type("Output", (), {"images": x.clone()})

    def load_lora_weights(self, file: str, adapter_name: str) -> None:
        self.loaded[adapter_name] = self.transformer.head.weight.shape

    def fuse_lora(self) -> None:
        self.transformer.head.weight.data += 1


def follow_the_guide(gathering, adapters, strategy):
    plain, sharded = Pipeline(), Pipeline()
    with sharing(2) as state:
        with strategy(sharded, state):
            found = [hsdp_report(sharded.text_encoder).shard == 2]
            for pipeline in (plain, sharded):
                if pipeline is sharded:
                    adapters["load"](pipeline, "file", "style")
                    found.append(pipeline.loaded == {"style": (5, 6)})
                    adapters["fuse"](pipeline)
                else:
                    pipeline.fuse_lora()
            expected = plain("a circle", "latent").images
            found.append(equal(gathering(sharded, "a circle"), expected))
        found.append(equal(sharded("a circle", "latent").images, expected))
    return found


def test_the_examples_with_a_pipeline_work(ranks):
    parts = example("gathered")["draw"], example("adapters"), example("strategy")["shard"]
    adapters = {name: parts[1][name] for name in ("load", "fuse")}
    found = ranks.run(follow_the_guide, parts[0], adapters, parts[2], world_size=2)
    assert found == [[True] * 4] * 2


class Packed(torch.nn.Parameter):
    """As packages for quantization make them."""


def test_every_reason_to_stay_whole_is_in_the_guide():
    values = {
        "`fp8: …`": torch.ones(2, 2).to(torch.float8_e4m3fn),
        "`not floating-point: …`": torch.ones(2, 2, dtype=torch.int8),
        "`a scalar`": torch.tensor(1.0),
        "`empty`": torch.empty(0, 3),
        "`not contiguous in memory`": torch.ones(3, 2).T,
    }
    text = GUIDE.read_text()
    model = toy()
    for number, value in enumerate(values.values()):
        parameter = torch.nn.Parameter(value, requires_grad=False)
        model.blocks[0].register_parameter(f"odd{number}", parameter)
    model.blocks[0].packed = Packed(torch.ones(2))
    whole = ignored.whole_parameters(model, find_blocks(model), {"head": model.head}, None)
    reasons = {re.sub(r"(?<=:).*| [A-Z'].*", " …", item.reason) for item in whole.values()}
    assert reasons >= {quoted.strip("`") for quoted in values}
    assert {"packed: …", "in the ignored module …"} < reasons
    for reason in reasons:
        assert f"`{reason}" in text, reason


def test_every_error_of_the_guide_is_one():
    text = GUIDE.read_text().split("### Errors")[1]
    said = re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)
    code = "\n".join(
        path.read_text()
        for module in (ignored, files)
        for path in Path(module.__file__).parent.glob("*.py")
    )
    plain = re.sub(r'"\s*\n\s*f?"', "", code).replace(
        "{what}", "load"
    )  # messages go over several lines
    for message in said:
        parts = [p.strip() for p in re.split(r"…|\d+", message) if len(p.strip()) > 12]
        assert parts, message
        for part in parts:
            assert part in plain or re.sub(r": 1 ×.*", "", part) in plain, part
