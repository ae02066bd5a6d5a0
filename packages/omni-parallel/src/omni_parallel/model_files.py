"""The configuration files of a model, in a folder here or on the hub; never its weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omni_group_coordinator import ParallelConfigError
from omni_parallel.v1 import ModelFacts
from omni_parallel.v1.model_facts import read_table
from omni_parallel_state.denoising.names import DENOISERS

_FILES = ("model_index.json", "config.json", "*/config.json", "*/tokenizer_config.json")

TEXT_TOKENS = 512
"""Of a prompt, where nothing says how many its pipeline makes."""


@dataclass(frozen=True)
class ModelFiles:
    """A pipeline, or one model, as its configuration files describe it."""

    name: str
    """Folder or name, as it was given."""
    folder: Path
    facts: ModelFacts
    components: Mapping[str, tuple[str, str]]
    """Library and class of each component with a configuration, by name."""

    @classmethod
    def find(cls, model: str) -> ModelFiles:
        """Of a folder, or of a name on the hub.

        Raises:
            ParallelConfigError: It is neither, or cannot be had.
        """
        folder = folder_of(model)
        facts = ModelFacts.from_folder(folder)
        if not (folder / "model_index.json").is_file():
            return cls(model, folder, facts, {"": ("diffusers", facts.name)})
        index = read_table(folder / "model_index.json")
        components = {
            name: (value[0], value[1])
            for name, value in index.items()
            if isinstance(value, list)
            and len(value) == 2
            and all(isinstance(part, str) for part in value)
            and (folder / name / "config.json").is_file()
        }
        return cls(model, folder, facts, components)

    @cached_property
    def defaults(self) -> Mapping[str, Any]:
        """Arguments of the pipeline's call that have a default; its class takes long to import."""
        if "" in self.components:
            return {}
        import diffusers

        found = getattr(diffusers, self.facts.name, None)
        parameters = {} if found is None else inspect.signature(found.__call__).parameters
        return {
            name: one.default
            for name, one in parameters.items()
            if one.default is not inspect.Parameter.empty
        }

    @property
    def denoiser(self) -> str:
        """Name of the component that predicts the noise.

        Raises:
            ParallelConfigError: There is none.
        """
        if "" in self.components:
            return ""
        for name in DENOISERS:
            if name in self.components:
                return name
        msg = (
            f"{self.name}: {self.facts.name} has no component that predicts noise; looked for: "
            f"{', '.join(DENOISERS)}"
        )
        raise ParallelConfigError(msg)

    @property
    def text_tokens(self) -> int:
        """Tokens of a prompt: what the pipeline asks for, as far as its tokenizer goes."""
        asked = self.defaults.get("max_sequence_length")
        longest = [asked if isinstance(asked, int) else TEXT_TOKENS]
        for name in ("tokenizer_2", "tokenizer"):
            path = self.folder / name / "tokenizer_config.json"
            if path.is_file():
                found = read_table(path).get("model_max_length")
                longest += [found] if isinstance(found, int) else []
                break
        return min(longest)


def folder_of(model: str) -> Path:
    """The folder of a model's configuration files: itself, or what the hub gives for its name.

    Raises:
        ParallelConfigError: It is neither, or cannot be had.
    """
    if Path(model).exists():
        return Path(model)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        msg = f"{model} is no folder here; for names on the hub: pip install huggingface_hub"
        raise ParallelConfigError(msg) from error
    try:
        return Path(snapshot_download(model, allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:  # what the hub raises is one of these
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        msg = f"{model} is neither a folder here nor a model of the hub that can be had: {why}"
        raise ParallelConfigError(msg) from error
