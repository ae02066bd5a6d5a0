"""Strategies are found by entry point, and a missing one says what to install."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from omni_group_coordinator import ParallelConfigError
from omni_parallel import v1
from omni_parallel.v1 import strategies


def test_sequence_parallelism_is_found_and_is_a_strategy() -> None:
    assert "sp" in v1.available_strategies()
    strategy = v1.load_strategy("sp")
    assert isinstance(strategy, v1.Strategy)
    assert strategy.name == "sp"


def test_a_missing_strategy_names_its_package_and_what_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(strategies, "entry_points", lambda group: ())
    with pytest.raises(ParallelConfigError, match=r"\(installed: none\); try: pip install omni-sp"):
        v1.load_strategy("sp")


def test_an_unknown_strategy_lists_what_is_installed() -> None:
    with pytest.raises(ParallelConfigError, match=r"'warp' is not installed \(installed: .*sp"):
        v1.load_strategy("warp")


def test_a_third_party_can_add_one_and_what_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = EntryPoint("odd", "math:pi", v1.STRATEGY_GROUP)
    monkeypatch.setattr(strategies, "entry_points", lambda group: (entry,))
    assert v1.available_strategies() == ("odd",)
    with pytest.raises(ParallelConfigError, match="'math:pi' of strategy 'odd' is no strategy"):
        v1.load_strategy("odd")
