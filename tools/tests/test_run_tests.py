"""Names of packages stand for the folders of their tests; the rest goes to pytest."""

from __future__ import annotations

import pytest

from members import read_packages
from run_tests import pytest_arguments


@pytest.mark.parametrize(
    ("given", "translated"),
    [
        ([], []),
        (["omni-sp"], ["packages/omni-sp/tests"]),
        (["omni-sp", "-k", "omni-pp"], ["packages/omni-sp/tests", "-k", "omni-pp"]),
        (["omni-sp", "tests"], ["packages/omni-sp/tests", "tests"]),
        (["-x", "-k", "ring"], ["-x", "-k", "ring"]),
        (["tools/tests/test_run_tests.py::x"], ["tools/tests/test_run_tests.py::x"]),
    ],
)
def test_leading_names_become_folders(given, translated):
    assert pytest_arguments(given) == translated


def test_an_unknown_name_is_answered_with_the_nearest_and_all_legal_ones():
    with pytest.raises(ValueError, match="Did you mean omni-sp") as raised:
        pytest_arguments(["omni_spp"])
    assert all(name in str(raised.value) for name in read_packages())
