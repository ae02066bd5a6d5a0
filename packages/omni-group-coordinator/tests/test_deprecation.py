"""Whoever calls what will go is told where, once, and what to write instead."""

from __future__ import annotations

import warnings

import pytest

from omni_group_coordinator.deprecation import deprecated


@deprecated(since="0.2", removed_in="0.4", instead="split(tensor)")
def cut(tensor: str, *, parts: int = 2) -> list[str]:
    """Cut a tensor."""
    return [tensor] * parts


class Group:
    @deprecated(since="0.2", removed_in="0.4", instead="Group.of(ranks)")
    def __init__(self, ranks: int) -> None:
        self.ranks = ranks


def test_a_call_warns_with_the_versions_and_the_remedy():
    text = r"test_deprecation\.cut is deprecated since 0\.2 and goes in 0\.4; use split\(tensor\)$"
    with pytest.warns(FutureWarning, match=text):
        assert cut("x", parts=3) == ["x"] * 3


def test_the_warning_is_at_the_caller_and_comes_once_for_each_place():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            cut("x")
        cut("y")
    assert [warning.filename for warning in caught] == [__file__] * 2
    assert caught[1].lineno == caught[0].lineno + 1


def test_a_class_warns_where_it_is_made():
    with pytest.warns(FutureWarning, match=r"Group\.__init__ is deprecated") as caught:
        assert Group(3).ranks == 3
    assert caught[0].filename == __file__


def test_the_docstring_says_so_and_the_name_stays():
    assert cut.__doc__ == (
        "Cut a tensor.\n\nDeprecated since 0.2, goes in 0.4: use ``split(tensor)``."
    )
    assert cut.__name__ == "cut"
    assert "goes in 0.4" in cut.__deprecated__
