"""What is said of a rank that failed: how it ended, how its words began, and what they came to."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from omni_parallel.launching.failures import first_failure, how, last_words, shortened


def failure(status: int, folder: Path) -> ProcessFailure:
    return ProcessFailure(local_rank=0, pid=1, exitcode=status, error_file=str(folder / "none"))


@pytest.mark.parametrize(
    ("status", "said"),
    [(3, " with status 3"), (-9, " by signal 9 (SIGKILL)"), (-63, " by signal 63")],
)
def test_how_a_process_ended(status: int, said: str, tmp_path: Path) -> None:
    assert how(failure(status, tmp_path)) == said


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    lines = [f"line {number}" for number in range(50)]
    found = shortened("\n".join(lines)).splitlines()
    assert found[:10] == lines[:10]
    assert found[10] == "  ... 21 lines left out ..."
    assert found[11:] == lines[-19:]
    assert shortened("\n".join(found)).splitlines() == found
    assert shortened("\n".join(lines[:30])).splitlines() == lines[:30]


def test_the_message_of_a_rank_has_its_first_line_and_its_last(tmp_path: Path) -> None:
    text = "\n".join(["Traceback (most recent call last):", *"abcdefgh" * 10, "ValueError: odd"])
    (tmp_path / "stderr.log").write_text(text)
    error = ChildFailedError("script.py", {2: failure(1, tmp_path)})
    said = first_failure(error, last_words(tmp_path)).splitlines()
    assert said[0] == "rank 2 was the first to fail with status 1 (all ranks have ended):"
    assert said[1] == "Traceback (most recent call last):"
    assert said[-1] == "ValueError: odd"
    assert "  ... 53 lines left out ..." in said
