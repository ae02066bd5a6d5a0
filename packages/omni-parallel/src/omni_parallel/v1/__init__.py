"""Version 1 of the API: finding and loading the installed strategies."""

from omni_parallel.v1.strategies import (
    STRATEGY_GROUP,
    Handle,
    Strategy,
    available_strategies,
    load_strategy,
)

__all__ = ["STRATEGY_GROUP", "Handle", "Strategy", "available_strategies", "load_strategy"]
