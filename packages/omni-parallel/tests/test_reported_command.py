"""One JSON object on standard output, whatever becomes of a command."""

from __future__ import annotations

import json
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from omni_parallel import __version__
from omni_parallel.launching.failures import RankFailedError
from omni_parallel.reported_command import Outcome, ReportedCommand


@click.command(cls=ReportedCommand)
@click.option("--nproc", type=click.IntRange(1), default=1)
@click.option("--what", default="pass")
def command(nproc: int, what: str, as_json: bool) -> Outcome:
    click.echo("progress", err=True)
    if what == "rank":
        raise RankFailedError(3, "rank 3 was the first to fail")
    if what == "interrupt":
        raise KeyboardInterrupt
    if what == "usage":
        msg = "no such thing"
        raise click.UsageError(msg)
    if not as_json:
        click.echo("words")
    return Outcome({"ranks": nproc}, passed=what == "pass")


def run(*options: str) -> tuple[Result, Any]:
    result = CliRunner().invoke(command, [*options, "--json"])
    found = json.loads(result.stdout)
    assert found.pop("version") == __version__
    assert found.pop("seconds") >= 0
    assert found.pop("command") == "command"
    return result, found


def test_what_a_command_found() -> None:
    result, found = run("--nproc", "2")
    assert result.exit_code == 0
    assert found == {"passed": True, "error": None, "ranks": 2}
    assert result.stderr == "progress\n"


def test_what_did_not_pass() -> None:
    result, found = run("--what", "fail")
    assert result.exit_code == 1
    assert found == {"passed": False, "error": None, "ranks": 1}


@pytest.mark.parametrize(
    ("options", "message", "rank"),
    [
        (("--what", "rank"), "rank 3 was the first to fail", 3),
        (("--what", "interrupt"), "interrupted; every rank has ended", None),
        (("--what", "usage"), "no such thing", None),
        (("--nproc", "0"), "Invalid value for '--nproc': 0 is not in the range x>=1.", None),
        (("--none",), "No such option '--none'.", None),
    ],
)
def test_an_error_is_reported_and_still_raised(
    options: tuple[str, ...], message: str, rank: int | None
) -> None:
    result, found = run(*options)
    assert result.exit_code != 0
    error = found.pop("error")
    assert found == {"passed": False}
    assert error["message"].startswith(message)
    assert error["rank"] == rank


def test_without_json_nothing_is_reported() -> None:
    result = CliRunner().invoke(command, [])
    assert result.stdout == "words\n"
    assert "--json" in CliRunner().invoke(command, ["--help"]).stdout
