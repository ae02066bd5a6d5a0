"""Which step of a request, and which guidance branch of it, a call of a denoiser belongs to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import ref

Undo = Callable[[], None]


class RequestClock:
    """Counts the calls of each denoiser between two steps of the scheduler.

    Attributes:
        step: Index of the step that is under way.
        request: Changes with each request.
    """

    def __init__(self) -> None:
        self.step = 0
        self.request = 0
        self._calls: dict[str, int] = {}

    def begin(self) -> None:
        """A new request."""
        self.request += 1
        self.step = 0
        self._calls.clear()

    def branch(self, denoiser: str) -> int:
        """The position of a call that is made now, among those of the denoiser in this step."""
        index = self._calls.get(denoiser, 0)
        self._calls[denoiser] = index + 1
        return index

    def tick(self) -> None:
        """The scheduler has made a step; several in a row count once."""
        if self._calls:
            self.step += 1
            self._calls.clear()

    def watch(self, scheduler: Any) -> Undo:
        """Have a scheduler's steps counted; copies of it are not.

        The object gets a subclass of its class, of the same name.

        Returns:
            Takes it off.
        """
        cls, own = type(scheduler), ref(scheduler)

        @functools.wraps(cls.step)  # pipelines ask for its parameters
        def step(this: Any, *args: Any, **kwargs: Any) -> Any:
            output = cls.step(this, *args, **kwargs)
            if this is own():
                self.tick()
            return output

        members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "step": step}
        # By "_omni_active" whoever takes off what lies below knows what may go with it.
        made: Any = type(cls.__name__, (cls,), members | {"_omni_active": True})
        scheduler.__class__ = made

        def undo() -> None:
            made._omni_active = False
            alive = own()
            if type(alive) is made:
                alive.__class__ = cls

        return undo
