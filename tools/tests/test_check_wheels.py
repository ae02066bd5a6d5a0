"""What the command refuses, and what it says of the table of packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

import check_wheels
import packages_guide
from import_times import import_time, too_slow
from members import read_packages
from packages_guide import END, START, Measured, stale, updated

SP = Measured("omni-sp", 81_400, ("omni-parallel-state", "torch"), (), 0.0312)
HSDP = Measured("omni-hsdp", 52_000, ("torch",), ("safetensors",), 0.029)
PAGE = updated(f"before\n{START}\nold\n{END}\nafter\n", [SP, HSDP])


def test_an_unknown_package_is_answered_with_the_legal_names():
    result = CliRunner().invoke(check_wheels.main, ["omni-spp"])
    assert result.exit_code == 1
    assert "no package omni-spp; there are omni-cfgp, " in result.output


@pytest.mark.parametrize("option", ["--write", "--check"])
def test_the_table_is_of_all_packages(option: str):
    result = CliRunner().invoke(check_wheels.main, ["omni-sp", option])
    assert result.exit_code == 2
    assert "--write and --check go without names" in result.output


def test_the_table_says_what_each_package_is():
    assert (
        f"""before
{START}
| package | wheel | needs | extras | import |
|---|--:|---|---|--:|
| `omni-sp` | 81 kB | torch, omni-parallel-state | none | 31 ms |
| `omni-hsdp` | 52 kB | torch | `safetensors` | 29 ms |
{END}
after
"""
        == PAGE
    )


def test_a_table_of_now_is_not_stale():
    assert stale(PAGE, [SP, HSDP]) == []


@pytest.mark.parametrize("size", [76_000, 88_000])
def test_a_wheel_may_grow_a_little(size: int):
    assert stale(PAGE, [replace(SP, size=size, seconds=0.04), HSDP]) == []


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (replace(SP, size=120_000), "the wheel of omni-sp has 120 kB, not 81 kB"),
        (replace(SP, needs=("torch",)), "omni-sp needs torch; extras: none"),
        (replace(SP, extras=("flash",)), "extras: `flash`"),
        (replace(SP, name="omni-sq"), "omni-sq is not in the table"),
    ],
)
def test_what_changed_is_named(now: Measured, said: str):
    assert said in "; ".join(stale(PAGE, [now, HSDP]))


def test_a_package_that_is_gone_is_named():
    assert stale(PAGE, [SP]) == ["omni-hsdp is no package"]


def test_the_page_names_every_package():
    text = packages_guide.GUIDE.read_text(encoding="utf-8")
    assert [name for name in read_packages() if f"\n| `{name}` | " not in text] == []


def replies(*numbers: float) -> Callable[..., str]:
    waiting = iter(numbers)
    return lambda *arguments: f"{next(waiting)}\n"


def test_the_time_of_an_import_is_the_median_without_the_first():
    assert import_time(replies(9.0, 0.03, 0.05, 0.01), "omni_sp", repeats=3) == 0.03


def test_an_import_over_the_limit_is_named_with_the_way_to_find_out():
    assert too_slow("omni_sp", 0.050) is None
    text = too_slow("omni_sp", 0.0721)
    assert text is not None
    assert text.startswith("importing omni_sp takes 72 ms beyond torch; legal: 50. `python -X imp")


@pytest.mark.parametrize(
    ("times", "found"), [([0.03], 0.03), ([0.07, 0.04], 0.04), ([0.07, 0.06], None)]
)
def test_an_import_is_slow_if_it_is_so_twice(
    monkeypatch: pytest.MonkeyPatch, times: list[float], found: float | None
):
    waiting = iter(times)
    monkeypatch.setattr(check_wheels, "import_time", lambda *_: next(waiting))
    measure = partial(check_wheels.timed, SimpleNamespace(execute=None))
    if found is None:
        with pytest.raises(click.ClickException, match=r"importing omni_sp takes 60 ms"):
            measure(read_packages()["omni-sp"])
    else:
        assert measure(read_packages()["omni-sp"]) == found
    assert list(waiting) == []
