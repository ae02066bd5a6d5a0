"""Which parallel state is current: the one of the innermost ``use()`` block, else the default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from omni_group_coordinator import ParallelError

if TYPE_CHECKING:
    from omni_parallel_state.state import ParallelState

_in_block: ContextVar[ParallelState | None] = ContextVar("omni_parallel_state", default=None)


class _ProcessDefault:
    """The state that `initialize_model_parallel` made.

    It belongs to the process and not to a context: a thread starts with an empty context, and
    the getters must answer there too.
    """

    state: ParallelState | None = None


_default = _ProcessDefault()


def default_state() -> ParallelState | None:
    """The state that `initialize_model_parallel` made, unless it has been destroyed."""
    state = _default.state
    return None if state is None or state.destroyed else state


def set_default_state(state: ParallelState | None) -> None:
    """Make a state the one that the getters read outside of every ``use()`` block."""
    _default.state = state


def find_parallel_state() -> ParallelState | None:
    """The current state, or None if there is none."""
    return _in_block.get() or default_state()


def get_parallel_state() -> ParallelState:
    """The current state: of the innermost ``with state.use():``, else the process default.

    Raises:
        ParallelError: There is none, or it has been destroyed.
    """
    state = find_parallel_state()
    if state is None:
        msg = (
            "there is no parallel state; call init_distributed_environment() and "
            "initialize_model_parallel(...) first, or enter `with state.use():`"
        )
        raise ParallelError(msg)
    if state.destroyed:
        msg = (
            "the parallel state of this `with state.use():` block has been destroyed, or torch's "
            "default group was; leave the block, or make a new state"
        )
        raise ParallelError(msg)
    return state


@contextmanager
def using(state: ParallelState) -> Iterator[ParallelState]:
    """Make a state current within the block, in this context only."""
    token = _in_block.set(state)
    try:
        yield state
    finally:
        _in_block.reset(token)
