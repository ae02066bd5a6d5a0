import pickle

import pytest

from omni_group_coordinator import (
    CommunicationError,
    ParallelConfigError,
    ParallelError,
    RankMismatchError,
)


@pytest.mark.parametrize("kind", [ParallelConfigError, RankMismatchError])
def test_every_error_is_a_parallel_error_and_a_runtime_error(kind: type[ParallelError]):
    assert issubclass(kind, ParallelError)
    assert issubclass(kind, RuntimeError)
    assert str(kind("what happened")) == "what happened"


def test_an_error_of_configuration_is_a_value_error_too():
    assert issubclass(ParallelConfigError, ValueError)
    assert not issubclass(CommunicationError, ValueError)


def test_a_communication_error_holds_group_ranks_and_operation():
    error = CommunicationError("broken", group="sp", ranks=[2, 3], operation="all_reduce")
    assert (error.group, error.ranks, error.operation) == ("sp", (2, 3), "all_reduce")
    assert str(error) == "broken"


def test_a_communication_error_can_be_pickled():
    error = CommunicationError("broken", group="sp", ranks=[2, 3], operation="all_reduce")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.group, again.ranks) == ("broken", "sp", (2, 3))
    assert again.operation == "all_reduce"
