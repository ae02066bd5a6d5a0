"""The package installs under its name and says which version it is."""

from importlib.metadata import version

import omni_cfgp


def test_the_version_is_the_one_that_was_installed():
    assert omni_cfgp.__version__ == version("omni-cfgp")
