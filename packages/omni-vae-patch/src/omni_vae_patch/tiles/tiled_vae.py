"""The tiles of an autoencoder's own tiled encoding and decoding, computed on several ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from omni_group_coordinator import GroupCoordinator, ParallelConfigError
from omni_parallel_state.denoising.structure import tensors_in
from omni_vae_patch.agreement import Attempt, settle
from omni_vae_patch.gradients import refuse_gradients
from omni_vae_patch.tiles.calls import Player, Worker
from omni_vae_patch.tiles.exchange import Piece, TileExchange
from omni_vae_patch.tiles.network_state import CallWatch, Place
from omni_vae_patch.tiles.plan import TilePlan, input_signature, make_plan
from omni_vae_patch.tiles.shared_norms import SharedNorms
from omni_vae_patch.tiles.stand_in import intercepted

_log = logging.getLogger("omni_vae_patch")
_DECODER, _ENCODER = "decoder", "encoder"
_PLANS = 64


class TiledVae:
    """Divides the tiles of an unmodified autoencoder over ranks.

    Tiles approximate the untiled decode; here they are divided over ranks, and the result equals
    the autoencoder's own tiled result bit for bit: its own code cuts and blends the tiles, and
    only the calls of its network are made elsewhere. Which tiles there are is the autoencoder's
    affair (`enabled_tiling`). Without tiling, one rank does all.

    Args:
        vae: With ``decode``, ``encode`` and the modules ``decoder``, ``encoder``; not changed.
        group: The ranks. Each has the autoencoder, and calls with the same input.
        result: ``"all"`` ranks get it, or the ``"first"``; the others then get ``None``, and
            need no memory for tiles that are not theirs.
        shared_norms: Whether group norms share their statistics over the tiles, which must then
            not be more than the ranks; see `SharedNorms`.
        decode: The method whose tiles are divided; default: the one that the autoencoder has now.
        encode: Likewise.

    Raises:
        ParallelConfigError: An unknown ``result``.
    """

    def __init__(
        self,
        vae: Any,
        group: GroupCoordinator,
        result: Literal["all", "first"] = "all",
        *,
        shared_norms: bool = False,
        decode: Callable[..., Any] | None = None,
        encode: Callable[..., Any] | None = None,
    ) -> None:
        if result not in ("all", "first"):
            msg = f"result={result!r} is no choice of who gets it; legal here: 'all', 'first'"
            raise ParallelConfigError(msg)
        self.vae = vae
        self.group = group
        self._destinations = range(group.world_size if result == "all" else 1)
        self._shared_norms = shared_norms
        # Looked up now, so that these methods may take their place on the autoencoder.
        self._methods = {
            _DECODER: decode or getattr(vae, "decode", None),
            _ENCODER: encode or getattr(vae, "encode", None),
        }
        self._exchange = TileExchange(group)
        self._plans: dict[str, TilePlan] = {}
        self._places: dict[str, set[Place]] = {_DECODER: set(), _ENCODER: set()}

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """As the autoencoder's own; call it on all ranks of the group.

        Returns:
            What the autoencoder's method returns, or ``None`` on ranks that get no result.

        Raises:
            ParallelConfigError: The autoencoder's code cannot be divided; the message says why.
            ParallelError: A rank failed; it raises its own error, the others raise this one.
            RankMismatchError: The ranks have other inputs or settings.
        """
        return self._run(_DECODER, args, kwargs)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """As the autoencoder's own; as `decode`."""
        return self._run(_ENCODER, args, kwargs)

    def _run(self, network: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        method = self._methods[network]
        if method is None or not isinstance(getattr(self.vae, network, None), nn.Module):
            msg = (
                f"a {type(self.vae).__qualname__} has no module {network!r} and method "
                f"{network[:-1]!r}, whose tiles are to be divided; use it on one rank"
            )
            raise ParallelConfigError(msg)
        refuse_gradients((args, kwargs))
        run = partial(method, *args, **kwargs)
        if self.group.world_size == 1 and not self._shared_norms:
            return run()
        with torch.no_grad():
            return self._divided(network, run, args, kwargs)

    def _divided(
        self, network: str, run: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        signature = input_signature(self.vae, network, args, kwargs)
        plan = self._plans.get(signature)
        work: Attempt | None = None
        if plan is None:
            plan, work = self._first(network, run, signature)
        if work is None:
            work = Attempt.of(partial(self._work, network, run, plan, None))
        what = f"tiled {network[:-1]}"
        pieces = [
            Piece(plan.owner(call), f"{network} {index} {call.inputs}")
            for index, call in enumerate(plan.calls)
        ]
        device = next((t.device for t in tensors_in((args, kwargs))), self.group.device)
        tiles = self._exchange.deliver(what, pieces, work, self._destinations, device)
        joined = Attempt()
        if self.group.rank_in_group in self._destinations:
            joined = Attempt.of(partial(self._join, network, run, plan, tiles))
        settle(self.group, f"joining the tiles of a {what}", joined)
        return joined.value

    def _first(
        self, network: str, run: Callable[[], Any], signature: str
    ) -> tuple[TilePlan, Attempt | None]:
        """The plan for inputs that are new, proved by making the calls under watch."""
        module, places = getattr(self.vae, network), self._places[network]
        name = type(self.vae).__qualname__
        while True:
            watch = CallWatch(module, name)
            plan = partial(make_plan, self.vae, network, run, places, self.group.world_size)
            planned = Attempt.of(plan)
            work = planned
            if planned.error is None:
                work = Attempt.of(partial(self._work, network, run, planned.value, watch))
            found = sorted(watch.changed - places)
            if found:
                work = Attempt()  # of calls that were torn apart, errors mean nothing
            notes = settle(
                self.group, f"tiled {network[:-1]}", work, found, asks=True, plan=signature
            )
            new = {tuple(place) for said in notes or [] for place in said}
            if not new:
                break
            places |= new
            _log.info("%s: the %s keeps state between its calls in %s", name, network, sorted(new))
        if len(self._plans) >= _PLANS:
            self._plans.clear()
        self._plans[signature] = planned.value
        return planned.value, None if self._shared_norms else work

    def _work(
        self, network: str, run: Callable[[], Any], plan: TilePlan, watch: CallWatch | None
    ) -> dict[int, Tensor]:
        module = getattr(self.vae, network)
        me = self.group.rank_in_group

        def make(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return module(*args, **kwargs) if watch is None else watch.call(args, kwargs)

        owner = type(self.vae).__qualname__
        worker = Worker(owner, make, plan.calls, plan.returned, plan.units_of(me))
        with intercepted(self.vae, network, worker.answer):
            if self._shared_norms and watch is None:
                with SharedNorms(module, self.group, plan, owner):
                    run()
            else:
                run()
        return worker.results

    def _join(
        self, network: str, run: Callable[[], Any], plan: TilePlan, tiles: dict[int, Tensor]
    ) -> Any:
        player = Player(type(self.vae).__qualname__, plan.calls, plan.returned, tiles)
        with intercepted(self.vae, network, player.answer):
            output = run()
        player.check_output(output)
        return output
