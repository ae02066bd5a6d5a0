"""``python tools/bench sp --quick`` runs a benchmark; ``hatch run bench`` does the same."""

import sys
from pathlib import Path

if not __package__:  # run as a folder, which puts the folder itself on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import click

from bench import cfg, e2e, hsdp, pp, sp, vae


@click.group()
def main() -> None:
    """Benchmarks of the strategies, each beside its rivals."""


main.add_command(cfg.main, "cfg")
main.add_command(e2e.main, "e2e")
main.add_command(hsdp.main, "hsdp")
main.add_command(pp.main, "pp")
main.add_command(sp.main, "sp")
main.add_command(vae.main, "vae")

if __name__ == "__main__":
    main(prog_name="bench")
