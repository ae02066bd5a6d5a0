"""What an autoencoder's tiling code will call for one kind of input, found out by running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_vae_patch.attributes import plain_settings
from omni_vae_patch.tiles.balance import balanced_owners
from omni_vae_patch.tiles.calls import Call, Recorder, describe_inputs
from omni_vae_patch.tiles.network_state import MemoryMarks, Place
from omni_vae_patch.tiles.pending import LookedAtError, UnpackedError
from omni_vae_patch.tiles.stand_in import intercepted

_MOST_RETURNED = 4


@dataclass(frozen=True)
class TilePlan:
    """The calls of one decode or encode, and who makes them."""

    calls: tuple[Call, ...]
    returned: int
    """How many things the network returns; 0 for a tensor that is not in a tuple."""
    owners: tuple[int, ...]
    """Group rank of each unit."""

    def owner(self, call: Call) -> int:
        """Group rank that makes a call."""
        return self.owners[call.unit]

    def units_of(self, rank: int) -> frozenset[int]:
        """The units of a rank."""
        return frozenset(unit for unit, owner in enumerate(self.owners) if owner == rank)


def make_plan(
    vae: Any,
    network: str,
    run: Callable[[], Any],
    places: set[Place],
    ranks: int,
) -> TilePlan:
    """Run the code on stand-ins and divide the calls that it makes.

    Args:
        vae: The autoencoder.
        network: Name of the attribute that is called for each tile.
        run: Runs the code.
        places: Where the network keeps state of its own.
        ranks: How many ranks there are.

    Raises:
        ParallelConfigError: The code never calls the network, or cannot do with stand-ins.
    """
    try:
        return _planned(vae, network, run, places, ranks, _shape_of_input)
    except ParallelError:
        raise
    except Exception:
        # Code that computes with the shapes of tiles before it joins them needs the true ones.
        return _planned(vae, network, run, places, ranks, _ShapeProbe(getattr(vae, network)))


def _shape_of_input(first: Tensor, args: object, kwargs: object) -> tuple[int, ...]:
    """Of the right number of dimensions, which is all that most code needs; costs nothing."""
    return tuple(first.shape)


class _ShapeProbe:
    """The shapes of results, by making one call for each kind of inputs."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._known: dict[str, tuple[int, ...]] = {}

    def __call__(
        self, first: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[int, ...]:
        key = describe_inputs(args, kwargs)
        if key not in self._known:
            output = self._module(*args, **kwargs)
            result = output[0] if isinstance(output, tuple | list) else output
            self._known[key] = tuple(result.shape)
        return self._known[key]


def _planned(
    vae: Any,
    network: str,
    run: Callable[[], Any],
    places: set[Place],
    ranks: int,
    shape_of: Callable[[Tensor, tuple[Any, ...], dict[str, Any]], tuple[int, ...]],
) -> TilePlan:
    owner = type(vae).__qualname__
    # Whether the network returns a tensor or several things shows in what the code does with it.
    for returned in (0, *range(2, _MOST_RETURNED + 1)):
        marks = MemoryMarks(getattr(vae, network), places)
        recorder = Recorder(owner, returned, marks, shape_of)
        try:
            with intercepted(vae, network, recorder.answer):
                run()
        except UnpackedError:
            continue
        except LookedAtError as error:
            msg = (
                f"the tiles of {owner} cannot be computed on several ranks: its code looks at "
                f"their values before it has them all ({error}); decode on one rank, or use the "
                "exact spatial mode"
            )
            raise ParallelConfigError(msg) from None
        except ValueError as error:
            if returned and "unpack" in str(error):
                continue
            raise
        finally:
            marks.restore()
        return _divided(recorder.calls(), returned, ranks, (owner, network))
    msg = (
        f"the tiles of {owner} cannot be computed on several ranks: its code takes more than "
        f"{_MOST_RETURNED} things from its {network}; decode on one rank"
    )
    raise ParallelConfigError(msg)


def _divided(
    calls: tuple[Call, ...], returned: int, ranks: int, names: tuple[str, str]
) -> TilePlan:
    if not calls:
        owner, network = names
        msg = (
            f"the tiles of {owner} cannot be computed on several ranks: its code never calls its "
            f"{network}; use it on one rank"
        )
        raise ParallelConfigError(msg)
    works = [0] * (1 + max(call.unit for call in calls))
    for call in calls:
        works[call.unit] += call.work
    return TilePlan(calls, returned, tuple(balanced_owners(works, ranks)))


def input_signature(vae: Any, network: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What a plan depends on: the inputs but for their values, and the autoencoder's settings."""
    given = [*enumerate(args), *sorted(kwargs.items())]
    words = [f"{name}={_word(value)}" for name, value in given]
    return f"{type(vae).__qualname__}.{network}({', '.join(words)}) with {plain_settings(vae)}"


def _word(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    return type(value).__qualname__
