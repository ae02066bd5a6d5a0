"""The guides say what the code has."""

import re
from pathlib import Path

from omni_sp.plans import KNOWN_PLANS

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "sequence-parallelism.md"


def test_the_table_of_models_lists_every_class_with_a_plan() -> None:
    table = GUIDE.read_text().split("<!-- models:begin -->")[1].split("<!-- models:end -->")[0]
    listed = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(listed) == sorted(KNOWN_PLANS)
