"""``omni-parallel completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from omni_parallel.completion.shells import SHELLS, VARIABLE


@click.command(epilog="In ~/.bashrc: source <(omni-parallel completion bash)")
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a script that completes commands, their options and layouts.

    bash and zsh source it; fish reads it as
    ~/.config/fish/completions/omni-parallel.fish.
    """
    kind = get_completion_class(shell)
    if kind is None:
        msg = f"click knows no completion for {shell}"
        raise click.ClickException(msg)
    root = click.get_current_context().find_root()
    click.echo(kind(root.command, {}, "omni-parallel", VARIABLE).source())
