"""What is known of a pipeline before any of its weights is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omni_group_coordinator import ParallelConfigError
from omni_parallel.model_files import folder_of
from omni_parallel.pipeline_request import NO_DIFFUSERS, OPTIONS, PipelineRequest
from omni_parallel.v1 import ModelFacts

_OF_VIDEOS = ("num_frames", "video_length")


@dataclass(frozen=True)
class KnownPipeline:
    """A pipeline of diffusers, by its configuration files."""

    model: str
    """Folder or name on the hub, as it was given."""
    facts: ModelFacts

    @classmethod
    def find(cls, model: str) -> KnownPipeline:
        """Of a folder, or of a name on the hub.

        Raises:
            ParallelConfigError: It is neither, or no pipeline, or diffusers is not installed.
        """
        if find_spec("diffusers") is None:
            raise ParallelConfigError(NO_DIFFUSERS)
        folder = folder_of(model)
        _check_index(model, folder)
        return cls(model, ModelFacts.from_folder(folder))

    @cached_property
    def kind(self) -> type[Any] | None:
        """Its class, which takes seconds to import; None: of the folder's code, not known.

        Raises:
            ParallelConfigError: diffusers has no such class.
        """
        name = self.facts.name
        if not name.isidentifier():  # a module of the folder, and its class
            return None
        import diffusers

        found: type[Any] | None = getattr(diffusers, name, None)
        if found is None:
            has = f"diffusers {diffusers.__version__}"
            msg = f"{self.model} is a {name}, which {has} does not have; try another version"
            raise ParallelConfigError(msg)
        return found

    @property
    def makes_videos(self) -> bool | None:
        """Whether it is asked for a number of frames; None: not known."""
        if self.kind is None:
            return None
        return any(name in inspect.signature(self.kind.__call__).parameters for name in _OF_VIDEOS)

    def check(self, request: PipelineRequest, options: Mapping[str, str] = OPTIONS) -> None:
        """Refuse what its call does not take.

        Args:
            request: What it is asked for.
            options: What to leave out, by the name of the argument.

        Raises:
            ParallelConfigError: There is such an argument.
        """
        if self.kind is None:
            return
        unknown = request.unknown_to(self.kind)
        if "prompt" in unknown:
            msg = f"{self.model}: {self.kind.__name__} takes no prompt; legal: pipelines that do"
            raise ParallelConfigError(msg)
        if unknown:
            leave = ", ".join(dict.fromkeys(options.get(name, name) for name in unknown))
            msg = f"{self.kind.__name__} takes no {', '.join(unknown)}; leave out: {leave}"
            raise ParallelConfigError(msg)

    def size_note(self, width: int | None, height: int | None) -> str | None:
        """What to say of a size that is no whole number of tokens, which pipelines change."""
        side = self.facts.token_pixels
        if side is None or width is None or height is None or not (width % side or height % side):
            return None
        nearest = "x".join(str(max(1, round(pixels / side)) * side) for pixels in (width, height))
        return (
            f"note: {width}x{height} is no multiple of {side} pixels, so {self.facts.name} makes "
            f"another size or refuses it; nearest: {nearest}"
        )


def _check_index(model: str, folder: Path) -> None:
    if (folder / "model_index.json").is_file():
        return
    why = "has no model_index.json"
    if not folder.is_dir():
        why = "is no folder"
    elif (folder / "config.json").is_file():
        why = "is a bare model, not a pipeline"
    msg = (
        f"{model} {why}; legal: a folder that a diffusers pipeline was saved to, which has a "
        "model_index.json"
    )
    above = folder.absolute().parent
    if (above / "model_index.json").is_file():
        msg += f"; nearest: {above}"
    raise ParallelConfigError(msg)
