"""What became of one piece of work: a value, or the error that it ended with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omni_group_coordinator import ParallelError
from omni_parallel_state.denoising.structure import Plain, describe, tensors_in
from omni_parallel_state.denoising.waiting import resolve_all


@dataclass(frozen=True)
class Outcome:
    """The value, or the error."""

    value: Any = None
    error: Exception | None = None

    @classmethod
    def of(cls, work: Callable[[], Any]) -> Outcome:
        """Do the work; an error is kept, for no rank may leave before its peers know of it."""
        try:
            value = resolve_all(work())  # stages of a pipeline hand out what has not arrived
            if any(tensor.requires_grad for tensor in tensors_in(value)):
                msg = (
                    "guidance over ranks is for inference, and the prediction asks for gradients; "
                    "call it under torch.no_grad() or torch.inference_mode()"
                )
                raise ParallelError(msg)
            return cls(value)
        except Exception as error:
            return cls(error=error)

    def described(self) -> tuple[Plain, Outcome]:
        """The description of the value; where it has none, the outcome is that error."""
        if self.error is not None:
            return None, self
        try:
            return describe(self.value), self
        except ParallelError as error:
            return None, Outcome(error=error)

    def report(self) -> Plain:
        """In words, for the other ranks; ``None`` if all went well."""
        if self.error is None:
            return None
        return f"{type(self.error).__name__}: {self.error}"
