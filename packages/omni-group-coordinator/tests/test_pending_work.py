"""What becomes of a message that nobody waits for."""

import gc
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from group_cases import everyone, raised, same, seeded

from omni_group_coordinator import CommunicationError
from omni_group_coordinator.pending_work import wait_all
from rank_harness import RankPool


def drop_a_send() -> list[str]:
    group = everyone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        if dist.get_rank() == 0:
            group.isend_tensor_dict({"a": seeded(1, 4)})
            gc.collect()
            works = group.isend_tensor_dict({"a": seeded(2, 4)})
            wait_all(works)
            works.clear()
        else:
            for seed in (1, 2):
                received = group.recv_tensor_dict()
                assert received is not None
                same(received["a"], seeded(seed, 4))
        gc.collect()
    return [str(warning.message) for warning in caught if warning.category is ResourceWarning]


def test_a_message_that_is_dropped_before_it_is_waited_for_is_told(ranks: RankPool):
    sender, receiver = ranks.run(drop_a_send)
    assert receiver == []
    assert sorted(sender) == [
        "metadata to group rank 1 in group 'all' was dropped without wait()",
        "send tensor dict to group rank 1 in group 'all' was dropped without wait()",
    ]


def drop_after_a_failure() -> list[str]:
    group = everyone(timeout=timedelta(seconds=1))
    if dist.get_rank() == 1:
        dist.barrier()
        return []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        works = group.isend_tensor_dict({"a": torch.ones(1000)})
        raised(lambda: wait_all(works), CommunicationError)
        works.clear()
        gc.collect()
    dist.barrier()
    return [str(warning.message) for warning in caught if warning.category is ResourceWarning]


def test_what_a_failed_group_has_lost_is_not_told_again(ranks: RankPool):
    assert ranks.run(drop_after_a_failure) == [[], []]
