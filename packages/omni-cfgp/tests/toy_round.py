"""A round of predictions that are there already."""

from __future__ import annotations

from typing import Any

from omni_cfgp.deferred import Deferred, arrived, fill, perform


class Round:
    """Predictions that arrive when they are asked for."""

    def __init__(self, *values: Any) -> None:
        self.flushes = 0
        self.values = values
        self.operations: list[Deferred] = []
        self.predictions = [Deferred(self, source) for source in range(len(values))]

    def remember(self, operation: Deferred) -> None:
        self.operations.append(operation)

    def flush(self) -> None:
        self.flushes += 1
        for prediction, value in zip(self.predictions, self.values, strict=True):
            if not arrived(prediction):
                fill(prediction, value)
        operations, self.operations = self.operations, []
        for operation in operations:
            perform(operation)
