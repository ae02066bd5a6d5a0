"""What ranks share of a pipeline's work: one value for all strategies."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state import ParallelLayout

VaeMode = Literal["auto", "exact", "tile"]

STRATEGIES: Mapping[str, tuple[str, ...]] = {
    "pp": ("pp",),
    "pipefusion": ("pipefusion",),
    "hsdp": ("hsdp", "hsdp_replicate"),
    "sp": ("ulysses", "ring"),
    "cfgp": ("cfg",),
    "vae_patch": ("vae_patch",),
}
"""Degrees that each strategy serves, in the order in which strategies are applied.

Calls stand in layers, the later around the earlier: guidance divides calls that go through stages.
The ranks of a stage share the weights that it holds, so it is cut before.
"""

OVERLAYS = ("hsdp", "hsdp_replicate", "vae_patch")
"""Degrees that lie over the ranks of the others, and add none."""

_NOTHING = "single"
"""The short form of what shares nothing."""
_FORM = "name=degree, several of them joined by commas, such as cfg=2,ulysses=4,vae_patch=8"


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """What ranks share. A degree is a number of ranks; 1 means off.

    ``dp``, ``cfg``, ``ulysses``, ``ring`` and ``pp`` or ``pipefusion`` multiply to the world.
    ``hsdp``, ``hsdp_replicate`` and ``vae_patch`` lie over the same ranks a second time.

    Raises:
        ParallelConfigError: A value is none; the message lists all that are wrong.
    """

    dp: int | None = None
    """Replicas, which are given different inputs; None: all ranks that the other degrees leave."""
    cfg: int = 1
    """Ranks that share the guidance branches."""
    ulysses: int = 1
    """Ranks that share the tokens, and exchange them for heads in attention."""
    ring: int = 1
    """Ranks that share the tokens, and pass keys and values on."""
    pp: int = 1
    """Ranks that share the blocks of the model, in stages, exactly."""
    pipefusion: int = 1
    """Ranks that share the blocks and patches of the image, with keys of the step before: an
    approximation. It takes ``ulysses`` times ``ring`` ranks for each stage, which share the tokens
    of a patch and give each other the keys, whichever of these two names are used."""
    hsdp: int = 1
    """Ranks that share one copy of the weights."""
    hsdp_replicate: int = 1
    """Copies of the shared weights in one mesh."""
    vae_patch: int = 1
    """Ranks that share what the autoencoder does."""
    vae_mode: VaeMode = "auto"
    """``"exact"``; ``"tile"``, an approximation; ``"auto"``: exact if the autoencoder can."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """More for a strategy, by its name: fields of its own configuration, such as
    ``{"sp": {"kv_exchange": "auto"}}``. A strategy that is not of this project is applied, after
    the others, if it is named here."""

    def __post_init__(self) -> None:
        wrong = [problem for name in degree_names() if (problem := self._problem(name))]
        if self.vae_mode not in get_args(VaeMode):
            legal = ", ".join(map(repr, get_args(VaeMode)))
            wrong.append(f"vae_mode={self.vae_mode!r}; legal: {legal}")
        if not _is_table_of_tables(self.options):
            wrong.append(
                f"options={self.options!r}; legal: a dict of options for each strategy, such as "
                "{'sp': {'kv_exchange': 'auto'}}"
            )
        if wrong:
            raise ParallelConfigError("; ".join(wrong))

    def _problem(self, name: str) -> str | None:
        degree = getattr(self, name)
        if name == "dp" and degree is None:
            return None
        if type(degree) is int and degree >= 1:
            return None
        nearest = f"; nearest: {name}=1" if type(degree) is int else ""
        return f"{name}={degree!r} is no number of ranks; legal: 1 (off) or more{nearest}"

    # -- other forms -----------------------------------------------------------------------

    @classmethod
    def of(cls, value: Any) -> ParallelConfig:
        """The configuration that a value stands for.

        Args:
            value: One already; the short form ``cfg=2,ulysses=4``; a dict; a path of a TOML or
                JSON file; None for one in which nothing is shared.

        Raises:
            ParallelConfigError: It stands for none.
        """
        if value is None:
            return cls()
        if isinstance(value, ParallelConfig):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if isinstance(value, Path) or (isinstance(value, str) and _is_file_name(value)):
            return cls.from_file(value)
        if isinstance(value, str):
            return cls.parse(value)
        msg = f"{value!r} is no configuration; legal: a ParallelConfig, {_FORM!r}, a dict, a path"
        raise ParallelConfigError(msg)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The configuration that the short form describes: ``cfg=2,ulysses=4,vae_mode=exact``.

        Raises:
            ParallelConfigError: Lists all parts that are wrong.
        """
        if text.strip() == _NOTHING:
            return cls()
        values: dict[str, Any] = {}
        wrong: list[str] = []
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals:
                wrong.append(f"{part!r} is no {_FORM}")
            elif name in values:
                wrong.append(f"{name} is given twice; legal: once")
            elif name != "vae_mode" and not re.fullmatch(r"-?[0-9]{1,9}", value):
                wrong.append(f"{name}={value} is no number of ranks; legal: 1 (off) or more")
            else:
                values[name] = value if name == "vae_mode" else int(value)
        return cls._made(values, wrong, repr(text))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that a dict describes, with the names of the attributes.

        Raises:
            ParallelConfigError: A name or a value is wrong.
        """
        return cls._made(dict(values), [], "the configuration")

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The configuration in a TOML or JSON file, with the names of the attributes.

        Raises:
            ParallelConfigError: It cannot be read, or describes none.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except OSError as error:
            msg = f"cannot read {path}: {error.strerror}"
            raise ParallelConfigError(msg) from error
        except ValueError as error:  # of both formats, and of bytes that are no text
            kind = "JSON" if path.suffix == ".json" else "TOML"
            msg = f"{path} is no {kind}: {error}"
            raise ParallelConfigError(msg) from error
        if not isinstance(values, dict):
            msg = f"{path} holds a {type(values).__name__}; legal: a table of {', '.join(_names())}"
            raise ParallelConfigError(msg)
        return cls._made(values, [], str(path))

    @classmethod
    def _made(cls, values: dict[str, Any], wrong: list[str], where: str) -> Self:
        unknown = [name for name in values if name not in _names()]
        if unknown:
            legal = ", ".join(_names())
            wrong = [*wrong, f"unknown: {', '.join(map(str, unknown))}; legal: {legal}"]
        known = {name: value for name, value in values.items() if name not in unknown}
        made = None
        try:
            made = cls(**known)
        except ParallelConfigError as error:
            wrong = [*wrong, str(error)]
        if made is None or wrong:
            msg = f"{where}: {'; '.join(wrong)}"
            raise ParallelConfigError(msg)
        return made

    def to_dict(self) -> dict[str, Any]:
        """What differs from the default, with the names of the attributes."""
        return {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if getattr(self, each.name) != (each.default if each.name != "options" else {})
        }

    def __str__(self) -> str:
        """The short form, without degrees of 1 and options; ``single`` where nothing is shared."""
        given = {name: value for name, value in self.to_dict().items() if name != "options"}
        degrees = (f"{name}={value}" for name, value in given.items() if value != 1)
        return ",".join(degrees) or _NOTHING

    # -- what it means ---------------------------------------------------------------------

    def layout(self, world_size: int) -> ParallelLayout:
        """Where each of so many ranks stands.

        Raises:
            ParallelConfigError: The degrees do not fit; names the nearest that do.
        """
        try:
            return ParallelLayout.for_world(
                world_size,
                dp=self.dp,
                cfg=self.cfg,
                pp=max(self.pp, self.pipefusion),
                ring=self.ring,
                ulysses=self.ulysses,
                fs=self.hsdp,
                replicate=self.hsdp_replicate,
                vae=self.vae_patch,
            )
        except ParallelConfigError as error:
            raise ParallelConfigError(self._in_my_words(str(error))) from None

    def _in_my_words(self, text: str) -> str:
        words = {"fs": "hsdp", "replicate": "hsdp_replicate", "vae": "vae_patch"}
        if self.pipefusion > 1:
            words["pp"] = "pipefusion"
        return re.sub(rf"\b({'|'.join(words)})(?==| with|:)", lambda one: words[one[0]], text)

    @property
    def ranks(self) -> int:
        """The smallest world that it fits."""
        degrees = {name: getattr(self, name) or 1 for name in degree_names()}
        layout = ParallelLayout(
            dp=degrees["dp"],
            cfg=self.cfg,
            pp=max(self.pp, self.pipefusion),
            ring=self.ring,
            ulysses=self.ulysses,
        )
        if layout.world_size > 1:
            return layout.world_size
        fs, replicate = self.hsdp, self.hsdp_replicate
        return ParallelLayout(fs=fs, replicate=replicate, vae=self.vae_patch).world_size

    def asked(self) -> tuple[str, ...]:
        """Strategies whose degrees are more than 1, in the order of `STRATEGIES`."""
        return tuple(
            name
            for name, degrees in STRATEGIES.items()
            if any(getattr(self, degree) > 1 for degree in degrees)
        )

    def strategies(self) -> tuple[str, ...]:
        """Strategies that it needs, in the order in which they are applied."""
        named = self.asked()
        if "pipefusion" in named:  # which shares tokens itself, of each patch
            named = tuple(name for name in named if name != "sp")
        return named + tuple(name for name in self.options if name not in STRATEGIES)

    def options_of(self, strategy: str) -> dict[str, Any]:
        """More arguments for one strategy."""
        options = dict(self.options.get(strategy, {}))
        if strategy == "vae_patch":
            options.setdefault("mode", self.vae_mode)
        return options


def degree_names() -> tuple[str, ...]:
    """Names of the degrees of a `ParallelConfig`."""
    return tuple(each.name for each in fields(ParallelConfig) if "int" in str(each.type))


def _names() -> tuple[str, ...]:
    return tuple(each.name for each in fields(ParallelConfig))


def _is_file_name(text: str) -> bool:
    return Path(text).suffix in (".toml", ".json")


def _is_table_of_tables(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str)
        and isinstance(options, Mapping)
        and all(isinstance(key, str) for key in options)
        for name, options in value.items()
    )
