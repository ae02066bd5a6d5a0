import pytest

from omni_group_coordinator import record_traffic
from omni_group_coordinator.traffic import count


def test_a_recording_counts_bytes_and_calls_by_operation():
    with record_traffic() as traffic:
        count("ring", 12)
        count("ring", 30)
        count("halo", 5)
    assert traffic.bytes_sent == {"ring": 42, "halo": 5}
    assert traffic.calls == {"ring": 2, "halo": 1}
    assert (traffic.total_bytes, traffic.total_calls) == (47, 3)


def test_what_runs_outside_the_block_is_not_counted():
    count("ring", 12)
    with record_traffic() as traffic:
        pass
    count("ring", 12)
    assert (traffic.total_bytes, traffic.total_calls) == (0, 0)


def test_recordings_nest():
    with record_traffic() as outer:
        count("ring", 1)
        with record_traffic() as inner:
            count("ring", 2)
        count("ring", 4)
    assert (outer.total_bytes, inner.total_bytes) == (7, 2)


def fail_within_a_recording() -> None:
    with record_traffic():
        raise KeyError


def test_a_recording_ends_with_an_exception():
    with record_traffic() as outer:
        with pytest.raises(KeyError):
            fail_within_a_recording()
        count("ring", 3)
    assert outer.total_bytes == 3
