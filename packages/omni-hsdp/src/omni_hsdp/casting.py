"""Casts what no gathering casts, as loading the model in that dtype would have cast it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from omni_hsdp.sharded_model import CastTensor, ShardedModel
from omni_parallel_state.checkpoints.dtypes import PLAIN_DTYPES, is_kept, kept_in_float32


def cast_buffers(record: ShardedModel) -> None:
    """Cast the persistent buffers of a model whose weights are cast when they are gathered.

    A float32 buffer beside bfloat16 weights would have what follows computed in float32.

    Args:
        record: Of the model, with the values in their places; remembers what the buffers were.
    """
    if record.cast_to is not None:
        _cast(record, _buffers(record.model, record.cast_to), record.cast_to)


def cast_on_one_rank(record: ShardedModel, output_dtype: torch.dtype | None) -> None:
    """Do to a model that no ranks share what gathering does: device and dtypes.

    The weights that were are kept in host memory for `restore_casts`.

    Args:
        record: Of the model, with the values in their places.
        output_dtype: What floating-point outputs of the model are cast to.
    """
    model = record.model
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device != record.device:
            tensor.data = tensor.data.to(record.device)
    if record.cast_to is not None:
        whole = {parameter.name for parameter in record.whole}
        _cast(record, _weights(model, whole), record.cast_to)
    if output_dtype is not None:

        def cast_output(_: nn.Module, __: Any, output: Any) -> Any:
            return tree_map(lambda leaf: _cast_number(leaf, output_dtype), output)

        record.output_hook = model.register_forward_hook(cast_output)


def restore_casts(record: ShardedModel) -> None:
    """Put back what was cast, save what somebody exchanged since, and stop casting outputs."""
    if record.output_hook is not None:
        record.output_hook.remove()
    for held, name, original, new in record.casts:
        if held.get(name) is new:
            if original.device != new.device:
                original.data = original.data.to(new.device)
            held[name] = original
    record.casts.clear()


_Place = tuple[dict[str, Any], str, Tensor]


def _cast(record: ShardedModel, places: Iterable[_Place], dtype: torch.dtype) -> None:
    done: dict[int, Tensor] = {}
    for held, name, old in list(places):
        new = done.get(id(old))
        if new is None:
            new = old.detach().to(dtype)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            done[id(old)] = new
            if old.device.type != "cpu" and not old.is_inference():
                old.data = old.data.to("cpu")  # may be large, as tables of positions are
        record.casts.append(CastTensor(held, name, old, new))
        held[name] = new


def _buffers(model: nn.Module, dtype: torch.dtype) -> Iterator[_Place]:
    if _casts_no_buffers(type(model)):
        return
    kept = kept_in_float32(model, dtype)
    for prefix, module in model.named_modules():
        for name in sorted(module._buffers.keys() - module._non_persistent_buffers_set):
            buffer = module._buffers[name]
            if buffer is None or buffer.dtype not in PLAIN_DTYPES or buffer.dtype is dtype:
                continue
            if not is_kept(f"{prefix}.{name}", kept):
                yield module._buffers, name, buffer


def _weights(model: nn.Module, whole: set[str]) -> Iterator[_Place]:
    """What ranks would share if there were several."""
    staying = {p for name, p in model.named_parameters() if name in whole}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in staying:
                yield module._parameters, name, parameter


def _cast_number(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _casts_no_buffers(cls: object) -> bool:
    """Whether a class of models, one of transformers, leaves buffers their dtype in loading."""
    return hasattr(cls, "config_class") and not hasattr(cls, "load_config")
