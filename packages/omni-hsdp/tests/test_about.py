"""The package installs under its name and says which version it is."""

from importlib.metadata import version

import omni_hsdp


def test_the_version_is_the_one_that_was_installed():
    assert omni_hsdp.__version__ == version("omni-hsdp")
