"""An autoencoder's encode and decode over ranks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch.distributed import ProcessGroup

from omni_group_coordinator import CommunicationError, GroupCoordinator, ParallelConfigError
from omni_parallel_state import Handle, ParallelState, get_parallel_state
from omni_vae_patch.agreement import agreed
from omni_vae_patch.replaced_method import ReplacedMethod
from omni_vae_patch.same_weights import check_weights
from omni_vae_patch.spatial.exact_vae import ExactVae
from omni_vae_patch.spatial.geometry import dtype_of
from omni_vae_patch.spatial.verification import verify
from omni_vae_patch.tiles import TiledVae, enabled_tiling
from omni_vae_patch.vae_config import VaeParallelConfig

_log = logging.getLogger("omni_vae_patch")
_handles: WeakKeyDictionary[Any, Handle] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Replacement:
    """What takes the place of the autoencoder's methods, and what else is to be undone."""

    decode: Callable[..., Any]
    encode: Callable[..., Any]
    undo: Callable[[], None]


def parallelize_vae(
    vae: Any,
    config: VaeParallelConfig | None = None,
    *,
    state: ParallelState | None = None,
    group: GroupCoordinator | ProcessGroup | None = None,
) -> Handle:
    """Divide the work of an autoencoder over ranks, with no change to its code.

    Every rank calls ``decode`` and ``encode`` with the same whole tensors. By default the result is
    exactly that of one rank, up to rounding: each rank holds some rows of every feature map,
    convolutions fetch the rows beyond them from the neighbours, norms and attention are over the
    whole. Sizes may change from call to call.

    Args:
        vae: An autoencoder of diffusers, or a pipeline that holds one as ``vae``.
        config: The mode, and who gets the result.
        state: The ranks: its ``vae`` group; default: the current state.
        group: Any group of ranks, in place of a state's.

    Returns:
        A handle that undoes it; also a context manager.

    Raises:
        ParallelConfigError: The autoencoder is parallel already, or cannot do what is asked.
        RankMismatchError: On every rank: their weights differ.
        RuntimeError: Neither state nor group was given, and no state is current.
    """
    config = VaeParallelConfig() if config is None else config
    vae = getattr(vae, "vae", vae)
    if not callable(getattr(vae, "decode", None)):
        msg = f"{type(vae).__name__} is neither an autoencoder nor a pipeline with one (vae)"
        raise ParallelConfigError(msg)
    if vae in _handles:
        msg = f"this {type(vae).__name__} is parallel already; call remove() of its handle first"
        raise ParallelConfigError(msg)
    if group is None:
        group = (get_parallel_state() if state is None else state).vae
    if isinstance(group, ProcessGroup):
        group = GroupCoordinator.from_process_group(group, name="vae")
    if group.world_size == 1:
        handle = Handle(lambda: _forget(ref(vae)))
    else:
        check_weights(vae, group)
        handle = _replace(vae, _replacement(vae, group, config))
    _handles[vae] = handle
    return handle


def _replacement(vae: Any, group: GroupCoordinator, config: VaeParallelConfig) -> _Replacement:
    if config.mode == "tile":
        return _tiled(vae, group, config)
    if config.shared_norms:
        msg = "shared_norms is for tiles: exact norms are over the whole; legal with mode='tile'"
        raise ParallelConfigError(msg)
    try:
        return _exact(vae, group, config)
    except ParallelConfigError as error:
        if config.mode == "exact" or config.dim != "auto":
            raise
        _log.warning("decoding by tiles, which approximate the whole: %s", error)
        return _tiled(vae, group, config)


def _exact(vae: Any, group: GroupCoordinator, config: VaeParallelConfig) -> _Replacement:
    what = f"sharding {type(vae).__name__}"
    low = dtype_of(vae) in (torch.bfloat16, torch.float16)
    if config.verify and low and not any("forward" in vars(m) for m in vae.modules()):
        # Compared in float32, where rounding does not hide what is wrong. Not where hooks have put
        # a forward on a module, which in a copy would still call that of the original.
        twin = agreed(group, what, lambda: copy.deepcopy(vae).to(torch.float32))
        _verified(twin, group, config, what).remove()
        config = replace(config, verify=False)
    exact = _verified(vae, group, config, what)
    return _Replacement(exact.decode, exact.encode, exact.remove)


def _verified(vae: Any, group: GroupCoordinator, config: VaeParallelConfig, what: str) -> ExactVae:
    made: list[ExactVae] = []

    def make() -> ExactVae:
        with _as_config_error(vae):
            made.append(ExactVae(vae, group, config))
        return made[0]

    try:
        exact = agreed(group, what, make)
        if config.verify:
            with _as_config_error(vae):
                verify(vae, exact, group)
    except BaseException:
        for one in made:
            one.remove()
        raise
    return exact


@contextmanager
def _as_config_error(vae: Any) -> Iterator[None]:
    """What an autoencoder's own code raises on a part of the whole says that it cannot have one."""
    try:
        yield
    except (ParallelConfigError, CommunicationError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        msg = f"{type(vae).__name__} cannot be sharded: {type(error).__name__}: {error}"
        raise ParallelConfigError(msg) from error


def _tiled(vae: Any, group: GroupCoordinator, config: VaeParallelConfig) -> _Replacement:
    stack = ExitStack()
    stack.enter_context(enabled_tiling(vae))
    tiled = TiledVae(vae, group, config.result, shared_norms=config.shared_norms)
    return _Replacement(tiled.decode, tiled.encode, stack.close)


def _replace(vae: Any, new: _Replacement) -> Handle:
    weak = ref(vae)
    methods = {"decode": new.decode, "encode": new.encode}
    replaced = [
        ReplacedMethod(vae, name, method) for name, method in methods.items() if hasattr(vae, name)
    ]

    def undo() -> None:
        for one in reversed(replaced):
            one.remove()
        new.undo()
        _forget(weak)

    return Handle(undo)


def _forget(weak: ref[Any]) -> None:
    if (alive := weak()) is not None:
        _handles.pop(alive, None)
