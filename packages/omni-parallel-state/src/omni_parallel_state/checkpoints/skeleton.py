"""Models without weights: parameters on the meta device, and everything else as it should be."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state.checkpoints.dtypes import PLAIN_DTYPES, is_kept, kept_in_float32


def build_skeleton(
    cls: Callable[..., nn.Module], folder: Path, dtype: torch.dtype | None
) -> nn.Module:
    """A model whose parameters have shape and dtype and no memory.

    Buffers, and tensors that are no parameters, are computed as always: on the meta device they
    would lose what no checkpoint holds.

    Args:
        cls: A model class of diffusers or transformers, or whatever makes a module when called.
        folder: Where its configuration is.
        dtype: That of its floating-point weights, but for what the class keeps in float32.
            Default: what the class or the configuration says.

    Raises:
        ParallelConfigError: No module comes of it, or its configuration is missing.
    """
    if dtype is not None and dtype not in PLAIN_DTYPES:
        msg = f"dtype={dtype!r}: legal: {', '.join(map(str, PLAIN_DTYPES))}, or None"
        raise ParallelConfigError(msg)
    make, dtype, own_dtypes = _maker(cls, folder, dtype)
    with _default_dtype(dtype), _parameters_on_meta():
        model = make()
    if not isinstance(model, nn.Module):
        msg = f"{cls!r} makes a {type(model).__name__}; pass the class of a module"
        raise ParallelConfigError(msg)
    _set_dtypes(model, dtype, own_dtypes)
    return model.eval()


def _maker(
    cls: Any, folder: Path, dtype: torch.dtype | None
) -> tuple[Callable[[], Any], torch.dtype | None, bool]:
    """How to make a model, in which dtype, and whether a class has a say in each of its own."""
    try:
        if hasattr(cls, "load_config"):  # diffusers
            config = cls.load_config(str(folder))
            return lambda: cls.from_config(config), dtype, False
        if hasattr(cls, "config_class"):  # transformers
            config = cls.config_class.from_pretrained(str(folder))
            given = dtype or getattr(config, "dtype", None)
            return lambda: cls._from_config(config, dtype=given), given, True
    except (OSError, ValueError) as error:
        msg = f"{folder} has no configuration for {cls.__name__}: {error}"
        raise ParallelConfigError(msg) from error
    return cls, dtype, False


def _set_dtypes(model: nn.Module, dtype: torch.dtype | None, own_dtypes: bool) -> None:
    """Give parameters and persistent buffers the dtype that loading the ordinary way gives them."""
    kept = kept_in_float32(model, dtype)
    changed: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.dtype not in PLAIN_DTYPES:
                continue
            wanted = parameter.dtype if dtype is None or own_dtypes else dtype
            if is_kept(f"{prefix}.{name}", kept):
                wanted = torch.float32
            if parameter.is_meta and wanted is not parameter.dtype and parameter not in changed:
                changed[parameter] = nn.Parameter(
                    parameter.detach().to(wanted), requires_grad=parameter.requires_grad
                )
            module._parameters[name] = changed.get(parameter, parameter)
        for name in module._buffers.keys() - module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None and buffer.dtype in PLAIN_DTYPES and not own_dtypes:
                wanted = torch.float32 if is_kept(f"{prefix}.{name}", kept) else dtype
                module._buffers[name] = buffer.to(wanted or buffer.dtype)


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put parameters that this thread registers on the meta device."""
    thread = threading.get_ident()

    def register(module: nn.Module, name: str, parameter: Any) -> nn.Parameter | None:
        plain = type(parameter) is nn.Parameter and not parameter.is_meta
        if not plain or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(register)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
