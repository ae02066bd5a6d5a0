"""The list of commands, and what shells complete, without the seconds that torch takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from omni_group_coordinator import ParallelError
from omni_parallel.cli import COMMANDS, TRACEBACK, commands, main
from omni_parallel.completion.layouts import DEGREES, MODES
from omni_parallel.completion.shells import SHELLS, VARIABLE
from omni_parallel.dtypes import DTYPES
from omni_parallel.v1 import ParallelConfig
from omni_parallel.v1.parallel_config import VaeMode, degree_names
from omni_parallel.verify.report import TOLERANCE

FAST = ("demo", "generate", "run", "plan", "verify", "doctor", "completion")
"""Commands whose options can be listed without torch."""
PROBE = """
import sys
from omni_parallel.cli import main
try:
    main()
finally:
    print("torch" in sys.modules)
"""

IN_PLACE_OF_RUN = """
import signal, sys, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background
from omni_parallel import cli
sys.modules["omni_group_coordinator"] = None  # as if its import had been interrupted
class Module(types.ModuleType):
    @property
    def run(self):
        {raises}
sys.modules["replaced"] = Module("replaced")
cli.COMMANDS["run"] = ("replaced", "")
cli.main()
"""


def with_run(raises: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What ``omni-parallel run`` does where its import raises something."""
    return subprocess.run(
        [sys.executable, "-c", IN_PLACE_OF_RUN.format(raises=raises), "run"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables},
    )


def completed(*words: str, incomplete: str) -> list[str]:
    complete = ShellComplete(commands(), {}, "omni-parallel", VARIABLE)
    return [item.value for item in complete.get_completions(list(words), incomplete)]


@pytest.mark.parametrize("name", list(COMMANDS))
def test_each_command_of_the_table_is_there_under_its_name(name: str) -> None:
    group = commands()
    context = click.Context(group)
    found = group.get_command(context, name)
    assert found is not None
    assert found.name == name
    assert name in group.list_commands(context)


@pytest.mark.parametrize(
    "options", [["--help"], ["--version"], *([name, "--help"] for name in FAST)], ids=" ".join
)
def test_help_imports_no_torch(options: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *options], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"
    assert "Usage: omni-parallel" in done.stdout or version("omni-parallel") in done.stdout


def test_a_command_that_is_none() -> None:
    result = CliRunner().invoke(commands(), ["genrate"])
    assert result.exit_code == 2
    assert "No such command 'genrate'" in result.output


BROKEN_OFF = """
        import signal
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pass
        raise {error}"""


@pytest.mark.parametrize(
    "raises",
    [
        "raise KeyboardInterrupt",
        # as libraries do that import in part, and go on
        BROKEN_OFF.format(error="RuntimeError('failed to import')"),
        BROKEN_OFF.format(error="cli.click.UsageError('not installed')"),
    ],
    ids=["raised", "swallowed", "an error of ours"],
)
def test_ctrl_c_while_modules_are_imported(raises: str) -> None:
    done = with_run(raises)
    assert done.returncode == 130
    assert done.stderr.strip() == "interrupted; every rank has ended"


def test_a_traceback_is_shown_where_it_is_asked_for() -> None:
    raises = """
        try:
            raise ValueError("the first")
        except ValueError:
            raise cli.click.UsageError("the second") from None"""
    done = with_run(raises)
    assert done.returncode == 2
    assert "Error: the second" in done.stderr
    assert "Traceback" not in done.stderr
    done = with_run(raises, **{TRACEBACK: "1"})
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "ValueError: the first" in done.stderr
    assert done.stderr.endswith("Error: the second\n")
    assert "Traceback" not in with_run(raises, **{TRACEBACK: "0"}).stderr


def test_words_of_an_error_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "127.0.0.1:abc [red] :smile:"

    def fails(*_: object, **__: object) -> None:
        raise ParallelError(words)

    monkeypatch.setattr(click.Group, "main", fails)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"error: {words}\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_for_each_shell(shell: str) -> None:
    result = CliRunner().invoke(commands(), ["completion", shell], prog_name="omni-parallel")
    assert result.exit_code == 0, result.output
    assert f"{VARIABLE}={shell}_complete" in result.stdout
    result = CliRunner().invoke(commands(), ["completion", "cmd"])
    assert result.exit_code == 2


def test_commands_and_options_are_completed() -> None:
    assert completed(incomplete="ge") == ["generate"]
    assert "--layout" in completed("generate", incomplete="--la")
    assert completed("generate", "--launcher", incomplete="") == ["torch", "ray"]
    assert completed("generate", "--dtype", incomplete="b") == ["bfloat16"]
    assert completed("plan", "--gpu", incomplete="h") == ["h100-sxm", "h100-pcie", "h200"]


def test_layouts_are_completed() -> None:
    assert completed("generate", "--layout", incomplete="ul") == [
        "ulysses=2", "ulysses=4", "ulysses=8",
    ]  # fmt: skip
    found = completed("run", "--layout", incomplete="cfg=2,")
    assert "cfg=2,ring=4" in found
    assert not any(one.startswith("cfg=2,cfg") for one in found)
    assert completed("run", "--layout", incomplete="vae_mode=t") == ["vae_mode=tile"]
    assert completed("run", "--layout", incomplete="au") == ["auto"]
    for layout in found:
        ParallelConfig.of(layout)


def test_what_is_said_twice_to_spare_torch_is_the_same() -> None:
    assert set(DEGREES) == set(degree_names())
    assert VaeMode.__args__ == MODES
    assert {one.name for one in fields(ParallelConfig)} - set(DEGREES) == {"vae_mode", "options"}
    assert set(TOLERANCE) == set(DTYPES)


@pytest.mark.skipif(shutil.which("bash") is None, reason="this needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("omni-parallel gen", ["generate"]),
        # bash takes = for the end of a word, and replaces what follows it
        ("omni-parallel run --layout cfg = 2,ul", ["2,ulysses=2", "2,ulysses=4", "2,ulysses=8"]),
        ("omni-parallel run --layout cfg =", ["2", "4", "8"]),
        ("omni-parallel run --layout ri", ["ring=2", "ring=4", "ring=8"]),
    ],
)
def test_bash_completes(words: str, expected: list[str]) -> None:
    listed = words.split()
    command = [sys.executable, "-c", "from omni_parallel.cli import main; main()"]
    script = subprocess.run(
        [*command, "completion", "bash"], capture_output=True, text=True, check=True
    ).stdout
    # The script calls the command by its name, the first word.
    shown = "\n".join(
        [
            script,
            f"COMP_WORDS=({' '.join(repr(word) for word in listed)})",
            f"COMP_CWORD={len(listed) - 1}",
            "_omni_parallel_completion omni-parallel",
            'printf "%s\\n" "${COMPREPLY[@]}"',
        ]
    )
    folder = os.path.dirname(sys.executable)
    done = subprocess.run(
        ["bash", "-c", shown],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
    )
    assert done.stdout.split() == expected
