"""Pytest plugin: the session-scoped fixture `ranks`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rank_harness.pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Give the pool of rank processes that the whole session shares."""
    with RankPool() as pool:
        yield pool
