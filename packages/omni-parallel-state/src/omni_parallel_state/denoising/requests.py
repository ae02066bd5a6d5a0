"""The calls of a pipeline: that the ranks of one image are asked for the same one."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from omni_group_coordinator import GroupCoordinator, ParallelError, RankMismatchError
from omni_parallel_state.denoising.operands import leaves

_LATENTS = "latents"

Seeds = Literal["broadcast", "error"]
"""What happens when the ranks of one image draw different random numbers."""


def agree(
    group: GroupCoordinator, args: tuple[Any, ...], kwargs: Mapping[str, Any], seeds: Seeds
) -> dict[str, Any]:
    """Compare a pipeline's call over the ranks, and give them one state of random numbers.

    Args:
        group: The ranks of one image.
        args: Positional arguments of the pipeline.
        kwargs: Named ones.
        seeds: What to do where random numbers or given latents differ.

    Returns:
        The named arguments, with the first rank's latents in place of given ones that differ.

    Raises:
        RankMismatchError: On every rank alike: arguments differ, or random states do and that
            was to be an error.
    """
    generators = [leaf for leaf in leaves((args, dict(kwargs))) if isinstance(leaf, Generator)]
    sources = _random(generators, kwargs, group, seeds)
    random = [_digest(generator.get_state()) for generator in sources]
    given = {str(index): _describe(value) for index, value in enumerate(args)}
    given |= {name: _describe(value) for name, value in sorted(kwargs.items())}
    said = group.all_gather_object([given, random])
    first, first_random = said[0]
    kinds = {one.get(_LATENTS, "").partition("#")[0] for one, _ in said}  # but for the digests
    latents = seeds == "broadcast" and len(kinds) == 1 and isinstance(kwargs.get(_LATENTS), Tensor)
    _check_arguments([one for one, _ in said], ignored=_LATENTS if latents else "")
    differs = any(one != first_random for _, one in said)
    if differs and seeds == "error":
        ranks = [rank for rank, (_, one) in enumerate(said) if one != first_random]
        msg = (
            f"group ranks {ranks} have another random state than group rank 0, so their latents "
            "would differ; pass a generator of the same seed on every rank, or seeds='broadcast'"
        )
        raise RankMismatchError(msg)
    if differs:
        for generator in sources:
            _share_state(group, generator)
    named = dict(kwargs)
    if latents and any(one[_LATENTS] != first[_LATENTS] for one, _ in said):
        named[_LATENTS] = group.broadcast(named[_LATENTS].clone())
    return named


def _check_arguments(said: list[dict[str, str]], ignored: str) -> None:
    for name in sorted({name for one in said for name in one} - {ignored}):
        found = [one.get(name, "nothing") for one in said]
        if len(set(found)) > 1:
            lines = [f"  group rank {rank}: {text}" for rank, text in enumerate(found)]
            msg = f"the ranks of one image were given different arguments {name!r}:\n" + "\n".join(
                lines
            )
            raise RankMismatchError(msg)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype} tensor {tuple(value.shape)} #{_digest(value)}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_describe, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_describe(item)}' for key, item in value.items())}}}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if callable(getattr(value, "tobytes", None)):  # pictures and arrays
        data: Any = value
        return f"{type(value).__name__} #{hashlib.sha256(data.tobytes()).hexdigest()[:12]}"
    return type(value).__name__


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    # Through its address: torch alone reaches the bytes at once only by numpy, which it can lack.
    return hashlib.sha256(ctypes.string_at(data.data_ptr(), data.numel())).hexdigest()[:12]


# -- random numbers ----------------------------------------------------------------------------


def _random(
    generators: list[Generator], kwargs: Mapping[str, Any], group: GroupCoordinator, seeds: Seeds
) -> list[Generator]:
    """The sources of random numbers of a call: those that were passed, else torch's own.

    With given latents few pipelines need any: that ranks differ in torch's own is no error then.
    """
    if generators:
        return generators
    if seeds == "error" and isinstance(kwargs.get(_LATENTS), Tensor):
        return []
    found = [torch.default_generator]
    if group.device.type != "cpu":
        module: Any = torch.get_device_module(group.device)
        if not hasattr(module, "default_generators"):
            msg = f"torch has no random generators for {group.device.type}; pass a generator"
            raise ParallelError(msg)
        found.append(module.default_generators[group.device.index or 0])
    return found


def _share_state(group: GroupCoordinator, generator: Generator) -> None:
    state = group.broadcast_tensor_dict({"state": generator.get_state()})
    if state is not None:
        generator.set_state(state["state"].cpu())
