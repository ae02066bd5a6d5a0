"""The package installs under its name and says which version it is."""

from importlib.metadata import version

import omni_pp


def test_the_version_is_the_one_that_was_installed():
    assert omni_pp.__version__ == version("omni-pp")
