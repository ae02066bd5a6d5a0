import pickle

import pytest

from omni_group_coordinator import (
    CommunicationError,
    ParallelConfigError,
    ParallelError,
    RankMismatchError,
)
from omni_group_coordinator.errors import reason_of


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


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "[/__w/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:9. This "
            "is typically caused by a remote worker crashing. Check the logs of the remote worker "
            "before reporting an error. GLHF! \U0001f3d6",
            "Connection closed by peer [::1]:9. This is typically caused by a remote worker "
            "crashing.",
        ),
        ("Connection reset. GLHF! :)", "Connection reset."),
        ("[Rank 3] timed out\nstack", "[Rank 3] timed out"),
        ("", "RuntimeError('')"),
    ],
)
def test_the_reason_of_a_backends_error_is_its_first_line_without_chatter(text: str, reason: str):
    assert reason_of(RuntimeError(text)) == reason
