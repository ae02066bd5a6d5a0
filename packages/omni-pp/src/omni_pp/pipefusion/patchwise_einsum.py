"""Sums of products by `torch.einsum`, as some schedulers combine steps, patch by patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omni_pp.pipefusion.patchwise_rules import Pending
from omni_pp.pipefusion.token_layout import TokenLayout


def einsum_rule(equation: str, operands: Sequence[Any]) -> TokenLayout | None:
    """Where tokens lie in the result of an ``einsum``; ``None`` if it does more with them.

    Args:
        equation: With an arrow.
        operands: One of them a `Pending`; others have no dimension in common with its tokens.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != len(operands):
        return None
    (index,) = [i for i, one in enumerate(operands) if isinstance(one, Pending)]
    layout: TokenLayout = operands[index].values.layout
    own = _letters(terms[index], len(operands[index].shape))
    others = {name for i, term in enumerate(terms) if i != index for name in term}
    if own is None or (result := _letters(right, None, own)) is None:
        return None
    tokens = [own[dim] for dim in layout.dims]
    if "." in others or any(name in others for name in tokens):
        return None
    if len(set(own)) < len(own) or any(name not in result for name in tokens):
        return None
    if result != [name for name in own if name in result]:
        return None
    return layout.moved(tuple(result.index(name) for name in tokens))


def _letters(term: str, ndim: int | None, own: list[str] | None = None) -> list[str] | None:
    """A name for each dimension: those of the ellipsis are numbers."""
    before, dots, after = term.partition("...")
    if own is not None:
        rest = [name for name in own if name.isdigit()]
    else:
        rest = [str(i) for i in range((ndim or 0) - len(before) - len(after))]
    if not dots and rest:
        return None
    return [*before, *rest, *after]
