"""Weights in safetensors files, in the layouts of diffusers and transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_group_coordinator import ParallelConfigError

_STEMS = ("diffusion_pytorch_model", "model")
_SUFFIX = ".safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint.

    Attributes:
        file: The file in which it is.
        shape: Its shape.
        dtype: Its dtype, or None for one that torch lacks.
        key: Its name in the file.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    key: str


def safetensors_module() -> Any:
    """The package safetensors.

    Raises:
        ParallelConfigError: It is not installed.
    """
    try:
        import safetensors
    except ImportError as error:
        msg = "reading a checkpoint needs the package safetensors; try: pip install safetensors"
        raise ParallelConfigError(msg) from error
    return safetensors


def checkpoint_entries(folder: Path, variant: str | None) -> dict[str, Entry]:
    """The tensors of a checkpoint, by key; of its files only the headers are read.

    Args:
        folder: Where the files are: one file, or an index and those that it names.
        variant: Such as ``"fp16"``.

    Raises:
        ParallelConfigError: Files are missing or damaged; names them.
    """
    files, listed = _files(folder, variant)
    missing = sorted(file.name for file in files if not file.is_file())
    if missing:
        msg = f"{folder} lacks {len(missing)} of the files that its index names: " + _list(missing)
        raise ParallelConfigError(msg)
    found = {}
    for file in files:
        with open_file(file) as opened:
            for key in opened.keys():  # noqa: SIM118 - it cannot be iterated
                header = opened.get_slice(key)
                dtype = _DTYPES.get(header.get_dtype())
                found[key] = Entry(file, tuple(header.get_shape()), dtype, key)
    absent = sorted(listed - found.keys())
    if absent:
        msg = f"the files of {folder} lack {len(absent)} tensors of its index: {_list(absent)}"
        raise ParallelConfigError(msg)
    return found


class open_file:  # noqa: N801 - used as a function
    """A safetensors file, mapped into memory; for a ``with`` block.

    Raises:
        ParallelConfigError: The file is damaged.
    """

    def __init__(self, file: Path) -> None:
        module = safetensors_module()
        try:
            self._opened = module.safe_open(str(file), framework="pt", device="cpu")
        except (module.SafetensorError, OSError) as error:
            msg = (
                f"{file} cannot be read: {error}; it is damaged or was not copied whole "
                f"({file.stat().st_size} bytes); fetch it again"
            )
            raise ParallelConfigError(msg) from error

    def __enter__(self) -> Any:
        return self._opened.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._opened.__exit__(*exception)


def read_rows(opened: Any, entry: Entry, rows: slice | None) -> Tensor:
    """A tensor of an open file, or some rows of it; no more than these is copied."""
    if rows is None:
        whole: Tensor = opened.get_tensor(entry.key)
        return whole
    if rows.start >= rows.stop:
        return torch.empty((0, *entry.shape[1:]))
    part: Tensor = opened.get_slice(entry.key)[rows]
    return part


def by_file(keys: Mapping[str, Entry]) -> Iterator[tuple[Path, list[str]]]:
    """The keys of each file, so that it is opened once."""
    for file in sorted({entry.file for entry in keys.values()}):
        yield file, [key for key, entry in keys.items() if entry.file == file]


def _files(folder: Path, variant: str | None) -> tuple[list[Path], set[str]]:
    """The files of a checkpoint, and the keys that its index lists, if it has one."""
    dotted = f".{variant}" if variant else ""
    looked_for = []
    for stem in _STEMS:
        index = folder / f"{stem}{_SUFFIX}.index{dotted}.json"
        single = folder / f"{stem}{dotted}{_SUFFIX}"
        looked_for += [index.name, single.name]
        if index.is_file():
            listed = _index(index)
            return sorted({folder / name for name in listed.values()}), set(listed)
        if single.is_file():
            return [single], set()
    there = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    msg = (
        f"{folder} has none of {', '.join(looked_for)}; there is: {_list(there) or 'nothing'}. "
        "Name a folder on this machine, the variant and the subfolder"
    )
    raise ParallelConfigError(msg)


def _index(file: Path) -> dict[str, str]:
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): str(name) for key, name in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{file} is no index of a checkpoint: {error!r}; fetch it again"
        raise ParallelConfigError(msg) from error


def _list(names: list[str]) -> str:
    return ", ".join(names[:50]) + (", …" if len(names) > 50 else "")
