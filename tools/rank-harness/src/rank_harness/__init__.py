"""Run a function on N gloo ranks in tests; see `RankPool` for the contract."""

from rank_harness.outcome import Outcome, RankFailure, RemoteError
from rank_harness.pool import RankPool

__all__ = ["Outcome", "RankFailure", "RankPool", "RemoteError"]
