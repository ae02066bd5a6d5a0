"""How long importing a package takes beyond torch's own import."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

LIMIT = 0.050
"""Seconds of processor time that an import may take."""

REPEATS = 7

# Only what torch's own import does not bring; nothing else runs in the interpreter.
PROBE = """
import sys, time
import torch
start = time.process_time()
__import__(sys.argv[1])
print(time.process_time() - start)
"""


def import_time(execute: Callable[..., str], name: str, repeats: int = REPEATS) -> float:
    """Median of several imports, each in a fresh interpreter.

    Args:
        execute: Runs an interpreter with arguments, and returns what it printed.
        name: What to import.
        repeats: How often.
    """
    execute("-c", PROBE, name)  # afterwards the files are in the system's cache
    return median(float(execute("-c", PROBE, name)) for _ in range(repeats))


def too_slow(name: str, seconds: float) -> str | None:
    """What to say of an import that takes too long."""
    if seconds <= LIMIT:
        return None
    return (
        f"importing {name} takes {seconds * 1e3:.0f} ms beyond torch; legal: {LIMIT * 1e3:.0f}. "
        f"`python -X importtime -c 'import torch, {name}'` shows where; import what is slow in the "
        "function that needs it"
    )
