"""Streams of tensors between the stages of a pipeline."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from group_cases import TIMEOUT, Guarded, raised, same, seeded

from omni_group_coordinator import (
    ParallelConfigError,
    ParallelError,
    PipelineGroupCoordinator,
    ProcessGroupPool,
    RankMismatchError,
    record_traffic,
)
from rank_harness import RankPool

worlds = pytest.mark.parametrize("world_size", [2, 3, 4])


def stages(timeout: timedelta = TIMEOUT) -> PipelineGroupCoordinator:
    ranks = list(range(dist.get_world_size()))
    return PipelineGroupCoordinator([ranks], dist.get_rank(), "gloo", timeout=timeout)


def go_down_and_back() -> None:
    """The latent goes through the stages, the last one's result back to the first."""
    pp = stages()
    assert pp.name == "pp"
    for step in range(3):
        with record_traffic() as traffic:
            latent = seeded(step, 4, 3)
            if not pp.is_first_rank:
                latent = pp.pipeline_recv()
            result = latent * 2 + pp.rank
            pp.pipeline_send(result)
            if pp.is_first_rank:
                latent = pp.pipeline_recv()
        assert traffic.calls["metadata"] == (1 if step == 0 else 0)
        assert traffic.bytes_sent["send channel"] == 48
        if pp.is_first_rank:
            expected = seeded(step, 4, 3)
            for rank in range(pp.world_size):
                expected = expected * 2 + rank
            same(latent, expected)


@worlds
def test_a_latent_goes_through_all_stages_and_back_with_metadata_once(
    ranks: RankPool, world_size: int
):
    ranks.run(go_down_and_back, world_size=world_size)


def patches_by_task() -> None:
    """Patches of two steps, received through the task queue; what was received stays valid."""
    pp = stages()
    shapes = [[2, 3], [1, 3], [0, 3]]
    pp.set_config(torch.float64)
    pp.set_recv_buffer(3, shapes, [3, 3])
    pp.set_extra_tensors_recv_buffer("text", [5], num_buffers=3, dtype=torch.int32)
    kept = []
    for step in range(2):
        for i, shape in enumerate(shapes):
            seed = 100 * pp.prev_rank + 10 * step + i
            patch = seeded(100 * pp.rank + 10 * step + i, *shape, dtype=torch.float64)
            pp.pipeline_isend(patch, segment_idx=i)
            pp.pipeline_isend(seeded(seed % 100, 5, dtype=torch.int32), "text", i)
            pp.add_pipeline_recv_task(i)
            pp.add_pipeline_recv_task(i, "text")
            pp.recv_next()
            pp.recv_next()
            text = pp.get_pipeline_recv_data(i, "text")
            same(text, seeded(seed % 100, 5, dtype=torch.int32))
            kept.append((pp.get_pipeline_recv_data(i), seeded(seed, *shape, dtype=torch.float64)))
        pp.wait_sends()
    for got, expected in kept:
        same(got, expected)


@worlds
def test_patches_arrive_through_the_task_queue_in_declared_buffers(
    ranks: RankPool, world_size: int
):
    ranks.run(patches_by_task, world_size=world_size)


def several_under_way() -> None:
    pp = stages()
    if pp.is_first_rank:
        for step in range(3):
            pp.pipeline_send(seeded(step, 4))
    else:
        for _ in range(3):
            pp.add_pipeline_recv_task()
        for _ in range(3):
            pp.recv_next()
        for step in range(3):
            same(pp.get_pipeline_recv_data(), seeded(step, 4))


def test_receives_of_one_segment_are_got_in_the_order_of_their_start(ranks: RankPool):
    ranks.run(several_under_way)


def skip_connections() -> None:
    """First half of the stages sends across the U, the second half receives."""
    pp = stages()
    size, place = pp.world_size, pp.rank_in_group
    pp.set_config(torch.float32)
    pp.set_skip_tensor_recv_buffer([[2], [3]], [5])
    if place < size // 2:
        pp.pipeline_isend_skip(seeded(place, 5))
        pp.pipeline_send_skip(Guarded(seeded(10 + place, 2)).tensor, 0)
        pp.pipeline_isend_skip(seeded(20 + place, 3), 1)
        pp.wait_sends()
    elif place >= (size + 1) // 2:
        mirror = size - 1 - place
        same(pp.pipeline_recv_skip(), seeded(mirror, 5))
        pp.add_pipeline_recv_skip_task(0)
        pp.add_pipeline_recv_skip_task(1)
        pp.recv_skip_next()
        pp.recv_skip_next()
        same(pp.get_pipeline_recv_skip_data(1), seeded(20 + mirror, 3))
        same(pp.get_pipeline_recv_skip_data(0), seeded(10 + mirror, 2))
    else:
        message = raised(lambda: pp.pipeline_send_skip(seeded(1, 5)), ParallelConfigError)
        assert "is this rank itself" in message


@worlds
def test_skip_tensors_go_to_the_mirror_stage(ranks: RankPool, world_size: int):
    ranks.run(skip_connections, world_size=world_size)


def both_directions() -> None:
    pp = stages(timedelta(seconds=10))
    for step in range(3):
        pp.pipeline_isend(seeded(10 * pp.rank + step, 300, 1000))
        same(pp.pipeline_recv(), seeded(10 * pp.prev_rank + step, 300, 1000))
        pp.wait_sends()
    other = 1 - pp.rank
    if pp.rank == 0:
        pp.send(seeded(1, 7))
        same(pp.recv((5,), torch.float32), seeded(2, 5))
    else:
        same(pp.recv((7,), torch.float32), seeded(1, 7))
        pp.send(seeded(2, 5))
    works = pp.isend_tensor_dict({"a": seeded(pp.rank, 300_000)}, other)
    got = pp.recv_tensor_dict(other)
    assert got is not None
    same(got["a"], seeded(other, 300_000))
    for work in works:
        work.wait()


def test_two_stages_that_send_to_each_other_at_once_do_not_wait_for_ever(ranks: RankPool):
    ranks.run(both_directions)


def groups_of_directions() -> None:
    rank = dist.get_rank()
    pool = ProcessGroupPool("gloo", timeout=TIMEOUT)
    pp = PipelineGroupCoordinator([[0, 1], [2, 3]], rank, "gloo", pool=pool)
    used = []
    post = dist.isend

    def note(tensor: torch.Tensor, **options: object) -> object:
        used.append(options["group"])
        return post(tensor, **options)

    dist.isend = note
    try:
        pp.pipeline_isend(seeded(rank, 3))
    finally:
        dist.isend = post
    same(pp.pipeline_recv(), seeded(pp.prev_rank, 3))
    pp.wait_sends()
    # Forward from the first stage, backward from the second, which has a group of its own.
    assert {group is pp.device_group for group in used} == {pp.is_first_rank}
    pp.destroy()
    pp.destroy()
    pool.destroy()


def test_two_stages_have_a_group_for_each_direction(ranks: RankPool):
    ranks.run(groups_of_directions, world_size=4)


def directions_of_three() -> tuple[list[bool], bool]:
    """To the next stage; from the last one that is the first again."""
    pp = stages()
    assert pp.device_group is not None
    forward = pp._direction(pp.group_next_rank, "dst").group is pp.device_group
    back = pp._direction(pp.group_prev_rank, "src").group is pp.device_group
    return [forward, back], pp._back is not None


def test_messages_to_an_earlier_stage_take_the_second_group_in_every_pipeline(ranks: RankPool):
    found = ranks.run(directions_of_three, world_size=3)
    assert [has_second for _, has_second in found] == [True] * 3
    # What each sends on, and what each gets from the stage before.
    assert [ways for ways, _ in found] == [[True, False], [True, True], [False, True]]


def other_than_declared() -> str:
    pp = stages()
    pp.set_recv_buffer(1, [[0, 2]], [0, 3], torch.float32)
    if pp.is_first_rank:
        pp.pipeline_isend(torch.empty(0, 4))
        pp.wait_sends()
        return ""
    return raised(pp.pipeline_recv, RankMismatchError)


def test_a_first_message_of_another_shape_than_declared_is_an_error(ranks: RankPool):
    message = ranks.run(other_than_declared)[1]
    assert "'latent/-1' was opened with latent: (0, 3) float32 cpu" in message
    assert "group rank 0 sends latent: (0, 4) float32 cpu" in message


def drift() -> None:
    pp = stages()
    if pp.is_first_rank:
        pp.pipeline_send(seeded(1, 4))
        pp.pipeline_send(seeded(2, 3), segment_idx=0)  # a segment has a shape of its own
        message = raised(lambda: pp.pipeline_send(seeded(3, 5)), RankMismatchError)
        assert "this rank sends latent: (5,) float32 cpu" in message
        pp.reset_buffer()
        pp.pipeline_send(seeded(3, 5))
    else:
        same(pp.pipeline_recv(), seeded(1, 4))
        same(pp.pipeline_recv(0), seeded(2, 3))
        pp.reset_buffer()
        same(pp.pipeline_recv(), seeded(3, 5))


def test_a_stream_changes_shape_after_a_reset_only(ranks: RankPool):
    ranks.run(drift)


def alone() -> PipelineGroupCoordinator:
    return PipelineGroupCoordinator([[0]], 0, "gloo")


def test_a_receive_that_was_not_queued_or_started_is_an_error():
    pp = alone()
    with pytest.raises(ParallelError, match="recv_next without a queued receive"):
        pp.recv_next()
    with pytest.raises(ParallelError, match="recv_next without a queued receive"):
        pp.recv_skip_next()
    with pytest.raises(ParallelError, match="no receive of stream 'latent', segment 2"):
        pp.get_pipeline_recv_data(2)
    with pytest.raises(ParallelError, match="no receive of stream 'skip', segment -1"):
        pp.get_pipeline_recv_skip_data()


def test_buffers_that_do_not_fit_together_are_refused():
    pp = alone()
    with pytest.raises(ParallelConfigError, match="no dtype is known for the stream 'latent'"):
        pp.set_recv_buffer(1, [[2]], [2])
    with pytest.raises(ParallelConfigError, match="=3, but patches_shape_list has 1 shapes"):
        pp.set_recv_buffer(3, [[2]], [2], torch.float32)
    with pytest.raises(ParallelConfigError, match="the stream 'skip'"):
        pp.set_skip_tensor_recv_buffer([[2]], [2])


def test_a_single_stage_sends_to_nobody_and_has_nothing_to_receive():
    pp = alone()
    pp.pipeline_send(seeded(1, 2))
    pp.pipeline_isend(seeded(1, 2))
    pp.wait_sends()
    pp.reset_buffer()
    with pytest.raises(ParallelConfigError, match="'pp' has one rank"):
        pp.pipeline_recv()
    pp.destroy()


def wrapped() -> None:
    pp = PipelineGroupCoordinator.from_process_group(dist.group.WORLD, name="pp")
    if pp.is_first_rank:
        pp.pipeline_send(seeded(1, 4))
        same(pp.pipeline_recv(), seeded(2, 4))
    else:
        same(pp.pipeline_recv(), seeded(1, 4))
        pp.pipeline_send(seeded(2, 4))


def test_a_pipeline_over_the_users_own_group_has_one_group_for_both_directions(ranks: RankPool):
    ranks.run(wrapped)


def object_over_the_pipeline() -> None:
    pp = stages()
    assert pp.broadcast_object([pp.rank], 1) == [1]
    pp.barrier()


def test_a_pipeline_broadcasts_objects(ranks: RankPool):
    ranks.run(object_over_the_pipeline, world_size=3)
