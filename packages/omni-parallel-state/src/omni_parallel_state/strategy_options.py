"""What a strategy can be told beyond the degrees of a layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from omni_group_coordinator import ParallelConfigError

C = TypeVar("C")


def config_with(kind: type[C], options: Mapping[str, Any], **given: Any) -> C:
    """A strategy's configuration, of its degrees and of the options for it.

    Args:
        kind: A dataclass.
        options: Fields of it that the user sets.
        given: Fields that the layout or the strategy sets, and so the user cannot.

    Raises:
        ParallelConfigError: An option is no field, or one that is given; names those that can be.
    """
    legal = [each.name for each in fields(kind) if each.init and each.name not in given]  # type: ignore[arg-type]
    unknown = [name for name in options if name not in legal]
    if unknown:
        msg = (
            f"{', '.join(unknown)}: no option of {kind.__name__} here; legal: "
            f"{', '.join(legal) or 'none'}"
        )
        raise ParallelConfigError(msg)
    return kind(**given, **options)
