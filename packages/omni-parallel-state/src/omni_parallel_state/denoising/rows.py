"""Dividing the rows of a batch: which arguments of a denoiser's call have them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Read from the calls of all pipelines of diffusers 0.42 that double their latents. What is not
# named here is part of the batch if its first dimension is as long.
_SHARED = ("img_ids", "txt_ids", "ofs", "img_hw", "ip_adapter_masks", "conditioning_mask")
_OF_AN_IMAGE = ("id_cond", "id_vit_hidden")  # ConsisID: one row, whatever the batch
_SHARED_PARTS = ("rotary", "rope", "freqs")
_OTHER_DIMS = {"encoder_hidden_states_llama3": 1}
_RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")
_MULTIPLES = ("sample", "encoder_hidden_states", "controlnet_cond", *_RESIDUALS)
"""In AnimateDiff there is a row for each frame."""
_Z_IMAGE = ("x", "cap_feats", "siglip_feats", "image_noise_mask")
_LISTS_OF_SAMPLES = (*_Z_IMAGE, "shape_list", "hidden_states", "sample", "encoder_hidden_states")

Path = tuple[str | int, ...]
"""Where a value lies in the arguments of a call: names and indices."""


@dataclass(frozen=True)
class RowPlan:
    """Which arguments of a call have rows.

    Attributes:
        rows: How many.
        dims: Where, and in which dimension; ``None`` for a list of samples.
    """

    rows: int
    dims: tuple[tuple[Path, int | None], ...]

    def take(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], start: int, stop: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call for some of the rows; containers are new ones."""
        found = dict(self.dims)

        def part(value: Any, path: Path) -> Any:
            if path in found:
                return self._part(value, found[path], start, stop)
            if type(value) in (tuple, list):
                return type(value)(part(item, (*path, i)) for i, item in enumerate(value))
            if type(value) is dict:
                return {key: part(item, (*path, key)) for key, item in value.items()}
            return value

        positional = tuple(part(value, (index,)) for index, value in enumerate(args))
        return positional, {name: part(value, (name,)) for name, value in kwargs.items()}

    def _part(self, value: Any, dim: int | None, start: int, stop: int) -> Any:
        if dim is None:
            return value[start:stop]
        share = value.shape[dim] // self.rows
        return value.narrow(dim, start * share, (stop - start) * share)


def plan_rows(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    names: Callable[[int], str],
    shared: Collection[str] = (),
) -> RowPlan | None:
    """Find the rows of a call; ``None`` if it has fewer than two.

    Args:
        args: Positional arguments.
        kwargs: Named ones.
        names: Gives the name of a positional parameter.
        shared: Further names of parameters without rows.
    """
    values: dict[Path, tuple[str, Any]] = {
        (index,): (names(index), value) for index, value in enumerate(args)
    }
    values |= {(name,): (name, value) for name, value in kwargs.items()}
    rows = _rows_of([named for named in values.values() if named[0] not in shared])
    if rows < 2:
        return None
    dims: list[tuple[Path, int | None]] = []
    for path, (name, value) in values.items():
        if name not in shared:
            _find(value, name, path, rows, dims)
    return RowPlan(rows, tuple(dims))


def sample_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a call denoises; ``None`` if that is a list of tensors, or not known."""
    sample = _sample(dict(kwargs), args[0] if args else None)
    return sample if isinstance(sample, Tensor) else None


def _sample(by_name: Mapping[str, Any], first: Any) -> Any:
    """The sample by its usual names; else the first argument, as every denoiser has it."""
    return by_name.get("hidden_states", by_name.get("sample", by_name.get("x", first)))


def _rows_of(values: list[tuple[str, Any]]) -> int:
    sample = _sample(dict(values), values[0][1] if values else None)
    if isinstance(sample, Tensor) and sample.ndim:
        return sample.shape[0]
    return len(sample) if isinstance(sample, list) else 0


def _find(
    value: Any, name: str, path: Path, rows: int, dims: list[tuple[Path, int | None]]
) -> None:
    if name in (*_SHARED, *_OF_AN_IMAGE) or any(part in name for part in _SHARED_PARTS):
        return
    if isinstance(value, Tensor):
        dim = _OTHER_DIMS.get(name, 0)
        length = value.shape[dim] if value.ndim > dim else 0
        if length == rows or (name in _MULTIPLES and length and length % rows == 0):
            dims.append((path, dim))
    elif type(value) is list and name in _LISTS_OF_SAMPLES and len(value) == rows:
        dims.append((path, None))
    elif type(value) in (tuple, list):
        for index, item in enumerate(value):
            _find(item, name, (*path, index), rows, dims)
    elif type(value) is dict:
        for key, item in value.items():
            if isinstance(key, str):
                _find(item, key, (*path, key), rows, dims)


def call_flags(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """What beside the rows may decide whether they see each other."""
    return tuple(
        (name, value if isinstance(value, bool | str) else type(value).__name__)
        for name, value in (*enumerate(args), *sorted(kwargs.items()))
    )
