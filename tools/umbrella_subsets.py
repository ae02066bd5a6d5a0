"""The umbrella with some of the strategies' wheels: what it says of those that are missing."""

from __future__ import annotations

import json
from pathlib import Path

import click

from members import ROOT, Packages
from wheels import Environment, environment, run, wheel_of

CORE = ("omni-group-coordinator", "omni-parallel-state", "omni-parallel")
STRATEGIES = ("omni-cfgp", "omni-hsdp", "omni-pp", "omni-sp", "omni-vae-patch")
SUBSETS: dict[str, tuple[str, ...]] = {
    "no strategy": (),
    "omni-sp alone": ("omni-sp",),
    "all but omni-hsdp": tuple(name for name in STRATEGIES if name != "omni-hsdp"),
    "every strategy": STRATEGIES,
}

SCRIPTS = ROOT / "tools" / "wheel_trials"

# A package whose strategy was written for an API that this umbrella does not know.
LATER = {
    "METADATA": "Metadata-Version: 2.1\nName: omni-sp\nVersion: 9.0.0\n",
    "entry_points.txt": "[omni_parallel.v9.strategies]\nsp = nowhere:strategy\n",
}


def try_subset(present: tuple[str, ...], packages: Packages, wheels: Path) -> None:
    """Install the umbrella beside these strategies alone; try its API, its command and ranks."""
    names = (*CORE, *present)
    own = [wheel_of(packages[name], wheels) for name in names]
    with environment(own, packages) as made:
        made.install(wheels, *names, alone=True)
        made.execute(str(SCRIPTS / "ask_umbrella.py"), *present)
        _try_command(made, names)
        if present:
            imports = (packages[name].import_name for name in present)
            made.execute_on_ranks(SCRIPTS / "run_umbrella.py", *imports)
        else:
            _add_later(made)
            made.execute(str(SCRIPTS / "ask_umbrella.py"), "--later")


def _try_command(made: Environment, names: tuple[str, ...]) -> None:
    command = str(made.python.parent / "omni-parallel")
    run([command, "--help"], made.folder)
    found = json.loads(run([command, "doctor", "--json", "--nproc", "2"], made.folder))
    there = {one["name"] for one in found["packages"] if one["version"] is not None}
    if there != set(names):
        msg = f"omni-parallel doctor says that {sorted(there)} are installed; it is {sorted(names)}"
        raise click.ClickException(msg)


def _add_later(made: Environment) -> None:
    folder = made.site / "omni_sp-9.0.0.dist-info"
    folder.mkdir()
    for name, text in LATER.items():
        (folder / name).write_text(text, encoding="utf-8")
