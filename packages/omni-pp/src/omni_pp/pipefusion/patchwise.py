"""Tensors whose values arrive patch by patch, while a pipeline already works with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from omni_parallel_state.denoising.structure import tensors_in
from omni_parallel_state.denoising.waiting import replaced_within
from omni_pp.pipefusion.patch_values import Ledger, Recorded, Values
from omni_pp.pipefusion.patchwise_einsum import einsum_rule
from omni_pp.pipefusion.patchwise_rules import FACTORIES, Pending, Rule, rule_for

_READS_MEMORY = frozenset(
    getattr(Tensor, name)
    for name in (
        *("numpy", "tolist", "data_ptr", "untyped_storage", "storage", "share_memory_"),
        *("__array__", "__reduce_ex__", "__deepcopy__", "__repr__", "__format__", "__dlpack__"),
    )
)
"""Methods of tensors that ask no operator for values."""


class PatchwiseTensor(Tensor):
    """Behaves as a tensor whose values are there.

    What is done with it that treats each element alone is recorded, and done for a patch when
    that is needed: by the next call of the denoiser. Anything else waits for all patches. Either
    way the result is that of a real tensor.
    """

    _omni_values: Values | None
    _omni_real: Tensor | None
    _omni_view: tuple[PatchwiseTensor, Callable[[Tensor], Tensor]] | None
    """What it shares memory with, and how it is a part of that."""

    @staticmethod
    def __new__(
        cls,
        values: Values,
        like: Tensor,
        device: torch.device,
        view: tuple[PatchwiseTensor, Callable[[Tensor], Tensor]] | None = None,
    ) -> PatchwiseTensor:
        """Args: its values; a tensor of the same shape and dtype; where it is; what it is of."""
        made: PatchwiseTensor = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device
        )
        made._omni_values, made._omni_real, made._omni_view = values, None, view
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch for each function of its API that is given one."""
        named = dict(kwargs or {})
        if func in _READS_MEMORY:
            return func(*real_all(args), **real_all(named))
        if func is torch.functional.einsum and (found := _einsum(args, named)) is not None:
            return found
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch for each of its operators that is given one."""
        named = dict(kwargs or {})
        if func._schema.is_mutable:
            return _in_place(func, args, named)
        if func._schema.name.removeprefix("aten::") in FACTORIES:
            return func(*map(_empty, args), **named)
        if any(is_pending(one) for one in tensors_in((args, named))):
            found = _recorded(func, args, named)
            if found is None:
                found = func.decompose(*args, **named)
            if found is not NotImplemented:
                return found
        return func(*real_all(args), **real_all(named))


def is_pending(value: object) -> bool:
    """Whether it is a tensor whose values have not all been asked for."""
    if not isinstance(value, PatchwiseTensor) or value._omni_real is not None:
        return False
    return value._omni_view is None or is_pending(value._omni_view[0])


def values_of(value: PatchwiseTensor) -> Values | None:
    """Its values patch by patch; ``None`` once somebody has asked for all of them."""
    return value._omni_values if is_pending(value) else None


def real_of(value: PatchwiseTensor) -> Tensor:
    """The tensor itself, for which all patches must arrive."""
    if value._omni_real is None:
        if value._omni_view is not None:
            base, part = value._omni_view
            value._omni_real = part(real_of(base))
        elif value._omni_values is not None:
            value._omni_values.ledger.arrive()
            value._omni_real = value._omni_values.layout.whole(value._omni_values.flat()).clone()
        value._omni_values = value._omni_view = None
    return value._omni_real  # type: ignore[return-value]


def real_all(value: Any) -> Any:
    """As `real_of`, also for what is within tuples, lists and dicts; others as they are."""
    return replaced_within(
        value, lambda one: real_of(one) if isinstance(one, PatchwiseTensor) else one
    )


def real_output(output: Any) -> Any:
    """The output of a pipeline with real tensors in it."""
    for name, value in list(getattr(output, "__dict__", {}).items()):
        found = real_all(value)
        if found is not value:
            setattr(output, name, found)
    return real_all(output)


# -- operators ---------------------------------------------------------------------------------


def _patchwise(value: Any) -> list[PatchwiseTensor]:
    return [one for one in tensors_in(value) if isinstance(one, PatchwiseTensor)]


def _map(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(_map(item, change) for item in value)
    return value


def _empty(value: Any) -> Any:
    """A tensor of the same shape, of any content."""
    if not isinstance(value, PatchwiseTensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _bare(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and no memory."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _shown(tensor: Tensor) -> Any:
    if not isinstance(tensor, PatchwiseTensor):
        return tensor
    values = values_of(tensor)
    return real_of(tensor) if values is None else Pending(values, tensor.shape)


def _in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator that changes one of its operands; it returns that one."""
    wrapped = {id(real_of(one)): one for one in _patchwise((args, kwargs))}
    found = func(*real_all(args), **real_all(kwargs))
    return _map(found, lambda tensor: wrapped.get(id(tensor), tensor))


def _recorded(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What stands for the result of an operator; ``None`` if it needs whole tensors."""
    tags = func.tags
    if torch.Tag.nondeterministic_seeded in tags or torch.Tag.data_dependent_output in tags:
        return None
    arguments = func._schema.arguments
    bound = dict(zip((one.name for one in arguments), args, strict=False)) | kwargs
    operands = [one for one in _patchwise(list(bound.values())) if is_pending(one)]
    pending = {name: _map(value, _shown) for name, value in bound.items()}
    ndim = max(one.ndim for one in tensors_in(list(bound.values())))
    waiting = [_shown(one) for one in operands]
    rule = rule_for(func, pending, waiting, ndim)
    if rule is None:
        return None
    like = _call(func, {n: _map(v, _bare) for n, v in bound.items() if n != "device"})
    likes = list(like) if isinstance(like, tuple | list) else [like]
    if not likes or not all(rule.layout.fits(one.shape) for one in likes):
        return None
    found = _results(func, bound, rule, likes, operands, waiting[0].values.ledger)
    return type(like)(found) if isinstance(like, tuple | list) else found[0]


def _call(func: Any, bound: Mapping[str, Any]) -> Any:
    """Call an operator, whose first argument may be named as python's own one of methods."""
    (_, first), *rest = bound.items()
    return func(first, **dict(rest))


def _results(
    func: Any,
    bound: Mapping[str, Any],
    rule: Rule,
    likes: list[Tensor],
    operands: list[PatchwiseTensor],
    ledger: Ledger,
) -> list[PatchwiseTensor]:
    """A tensor for each result."""
    device = bound.get("device") or operands[0].device
    (_, first), *rest = rule.args.items()
    found = []
    for index, like in enumerate(likes):
        function = func if len(likes) == 1 and not _is_many(func) else _Item(func, index)
        values = Recorded(ledger, rule.layout, function, (first,), dict(rest))
        view = None
        if func.is_view:
            view = operands[0], partial(_again, func, dict(bound), index)
        shown = like if view is not None else like.contiguous()
        found.append(PatchwiseTensor(values, shown, torch.device(device), view))
    return found


def _is_many(func: Any) -> bool:
    return bool(func._schema.returns[0].type.kind() == "ListType")


class _Item:
    """One of the results of an operator that has several."""

    def __init__(self, func: Any, index: int) -> None:
        self._func, self._index = func, index

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = self._func(*args, **kwargs)[self._index]
        return found


def _again(func: Any, bound: dict[str, Any], index: int, base: Tensor) -> Tensor:
    """A view of what a tensor really is."""
    (_, _), *rest = bound.items()
    found = func(base, **dict(rest))
    view: Tensor = found[index] if isinstance(found, tuple | list) else found
    return view


def _einsum(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """An ``einsum`` over other dimensions than those of tokens; ``None`` if it is another."""
    flat = [item for arg in args for item in (arg if isinstance(arg, tuple | list) else [arg])]
    if kwargs or not isinstance(flat[0], str):
        return None
    equation, operands = flat[0], flat[1:]
    waiting = [one for one in operands if is_pending(one)]
    if len(waiting) != 1:
        return None
    values = values_of(waiting[0])
    shown = [_shown(one) for one in operands]
    layout = einsum_rule(equation, shown)
    if layout is None or values is None:
        return None
    like = torch.einsum(equation, *map(_bare, operands))
    made = [one.values if isinstance(one, Pending) else one.clone() for one in shown]
    found = Recorded(values.ledger, layout, torch.einsum, (equation, *made), {})
    return PatchwiseTensor(found, like.contiguous(), waiting[0].device)
