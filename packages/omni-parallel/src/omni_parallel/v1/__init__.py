"""Version 1 of the API: what ranks share, in one value and one call, over any set of strategies."""

from omni_parallel.v1.application import Parallelized, parallelize
from omni_parallel.v1.explanation import explain
from omni_parallel.v1.installed_packages import PackageVersion, versions
from omni_parallel.v1.legal_layouts import auto_config
from omni_parallel.v1.model_facts import ModelFacts
from omni_parallel.v1.parallel_config import ParallelConfig
from omni_parallel.v1.problems import find_problems, validate
from omni_parallel.v1.strategies import (
    STRATEGY_GROUP,
    Handle,
    Strategy,
    available_strategies,
    load_strategy,
)

__all__ = [
    "STRATEGY_GROUP",
    "Handle",
    "ModelFacts",
    "PackageVersion",
    "ParallelConfig",
    "Parallelized",
    "Strategy",
    "auto_config",
    "available_strategies",
    "explain",
    "find_problems",
    "load_strategy",
    "parallelize",
    "validate",
    "versions",
]
