"""Puts this folder on the path of the tests and, through the harness, of their ranks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
