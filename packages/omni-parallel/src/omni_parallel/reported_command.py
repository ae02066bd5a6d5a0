"""A command whose outcome is one JSON object where that is asked for, also when it fails."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click

from omni_parallel.__about__ import __version__


@dataclass(frozen=True)
class Outcome:
    """What a command found."""

    keys: dict[str, Any] = field(default_factory=dict)
    """Its own keys of the JSON object."""
    passed: bool = True
    """Whether the exit status is 0, else 1."""


class ReportedCommand(click.Command):
    """A command with ``--json``, whose function returns an `Outcome`.

    With ``--json`` standard output has one object and nothing else: ``command``, ``version``,
    ``passed``, ``seconds``, ``error`` (None, or its ``message``, and the ``rank`` that was the
    first to fail if one did), and keys of its own. Everything else goes to standard error, errors
    too, and exit statuses are the same.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        said = "Print one JSON object and nothing else."
        self.params.append(click.Option(["--json", "as_json"], is_flag=True, help=said))

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Read the options; a mistake in one is reported, too."""
        with self._reported(self._asks(info_name, args, parent)):
            return super().make_context(info_name, args, parent, **extra)

    def _asks(self, info_name: str | None, args: list[str], parent: click.Context | None) -> bool:
        if self.context_settings.get("allow_interspersed_args", True):
            return "--json" in args
        # What follows the first argument is not ours, so it takes parsing to tell.
        found = super().make_context(info_name, list(args), parent, resilient_parsing=True)
        return bool(found.params.get("as_json"))

    def invoke(self, ctx: click.Context) -> Any:
        """Call the function, print its outcome, and exit with 1 if it did not pass."""
        as_json = ctx.params["as_json"]
        start = time.monotonic()
        with self._reported(as_json):
            outcome: Outcome = super().invoke(ctx)
        if as_json:
            self._print(outcome.passed, time.monotonic() - start, None, outcome.keys)
        if not outcome.passed:
            ctx.exit(1)

    @contextmanager
    def _reported(self, as_json: bool) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        except click.exceptions.Exit:  # of --help
            raise
        except BaseException as error:
            if as_json:
                found = {"message": _words(error), "rank": getattr(error, "rank", None)}
                self._print(False, time.monotonic() - start, found, {})
            raise

    def _print(
        self, passed: bool, seconds: float, error: dict[str, Any] | None, keys: dict[str, Any]
    ) -> None:
        found = {
            "command": self.name,
            "version": __version__,
            "passed": passed,
            "seconds": round(seconds, 3),
            "error": error,
            **keys,
        }
        click.echo(json.dumps(found, indent=2))


def _words(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt | SystemExit):  # the second of Ray, at a SIGTERM
        return "interrupted; every rank has ended"
    if isinstance(error, click.ClickException):
        return error.format_message()
    return str(error) or type(error).__name__
