"""What is installed in this environment, and what a distribution really needs of it."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(requirements: Iterable[str]) -> set[str]:
    """Return the installed distributions that the requirements bring, directly or not.

    Args:
        requirements: Requirements as in a package's metadata, for example ``"torch>=2.13"``.

    Returns:
        Canonical names. A requirement whose marker does not hold here is left out.
    """
    done: set[tuple[str, str]] = set()  # names with one extra each, "" for none
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        needed, extra = waiting.pop()
        if needed.marker is not None and not needed.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(needed.name)
        for own_extra in {"", *needed.extras} - {seen for other, seen in done if other == name}:
            done.add((name, own_extra))
            requires = metadata.distribution(name).requires or ()
            waiting += [(Requirement(text), own_extra) for text in requires]
    return {name for name, _ in done}


def top_level_paths(name: str) -> set[Path]:
    """Return the files and folders in site-packages that belong to a distribution."""
    distribution = metadata.distribution(name)
    tops = {file.parts[0] for file in distribution.files or ()}
    paths = {Path(str(distribution.locate_file(top))) for top in tops - {"..", "__pycache__"}}
    return {path for path in paths if path.exists()}
