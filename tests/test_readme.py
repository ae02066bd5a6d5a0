"""The README's examples run as they stand, but for the model, the prompt and the size."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

README = Path(__file__).parents[1] / "README.md"
SMALL = {
    '"path/to/flux"': repr(str(files("omni_parallel") / "demo" / "model")),
    '"a red fox in the snow"': '"a red circle", height=64, width=64, num_inference_steps=2',
}


@pytest.mark.parametrize(("index", "ranks"), [(0, 4), (1, 2)])
def test_the_examples_of_the_readme_run(tmp_path: Path, index: int, ranks: int) -> None:
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[index]
    for shown, small in SMALL.items():
        assert code.count(shown) == 1
        code = code.replace(shown, small)
    (tmp_path / "script.py").write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*torchrun, f"--nproc-per-node={ranks}", "script.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "fox.png").read_bytes().startswith(b"\x89PNG")
