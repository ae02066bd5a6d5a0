"""A copy of what the tools read of this repository, to plant defects in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from members import ROOT


@pytest.fixture
def copied_root(tmp_path: Path) -> Path:
    sources = [ROOT / "pyproject.toml", *ROOT.glob("packages/omni-*/pyproject.toml")]
    sources += ROOT.glob("packages/omni-*/src/*/__about__.py")
    for source in sources:
        target = tmp_path / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return tmp_path
