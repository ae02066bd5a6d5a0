"""Lets the tests of this folder import what they share, with each other and with others."""

import sys
from pathlib import Path

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parent), str(_HERE.parents[3] / "tests")]
