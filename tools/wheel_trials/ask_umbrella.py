"""Asks the umbrella about strategies that are installed, and about those that are not.

``ask_umbrella.py omni-sp`` where omni-sp alone is; ``ask_umbrella.py --later`` where omni-sp is
there in a version whose API the umbrella does not know.
"""

from __future__ import annotations

import sys

import omni_parallel
from omni_group_coordinator import ParallelConfigError
from omni_parallel.v1 import find_problems, load_strategy

# For each package, a layout that asks for it and the strategies that it brings.
ASKED = {
    "omni-sp": ("ulysses=2", ("sp",)),
    "omni-cfgp": ("cfg=2", ("cfgp",)),
    "omni-pp": ("pp=2", ("pp", "pipefusion")),
    "omni-hsdp": ("hsdp=2", ("hsdp",)),
    "omni-vae-patch": ("vae_patch=2", ("vae_patch",)),
}


def refused(strategy: str) -> str:
    """Why a strategy is not loaded."""
    try:
        load_strategy(strategy)
    except ParallelConfigError as error:
        return str(error)
    return ""


def expect(holds: bool, what: object) -> None:
    """Fail, with what was found."""
    if not holds:
        sys.exit(f"unexpected: {what}")


def ask(present: list[str]) -> None:
    """See that what is there is used, and that what is missing is named."""
    versions = {one.name: one for one in omni_parallel.versions()}
    for package, (layout, strategies) in ASKED.items():
        config = omni_parallel.ParallelConfig.parse(layout)
        problems = find_problems(config, 2)
        there, found = package in present, versions[package]
        expect((found.version is not None) == there, found)
        expect(not found.problem, found)
        expect((problems == []) == there, problems)
        for strategy in strategies:
            expect((refused(strategy) == "") == there, refused(strategy))
            if not there:
                remedy = f"try: pip install {package}"
                expect(remedy in refused(strategy), refused(strategy))
                expect(remedy in "\n".join(problems), problems)
    expect(not omni_parallel.versions()[0].problem, versions)


def ask_of_later() -> None:
    """See that a strategy for a later API is refused, and what to do about it."""
    config = omni_parallel.ParallelConfig.parse("ulysses=2")
    for text in (refused("sp"), "\n".join(find_problems(config, 2))):
        expect("omni-sp 9.0.0 speaks v9 of the API" in text, text)
        expect("pip install --upgrade omni-parallel omni-sp" in text, text)


if __name__ == "__main__":
    if sys.argv[1:] == ["--later"]:
        ask_of_later()
    else:
        ask(sys.argv[1:])
