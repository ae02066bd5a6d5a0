"""Gathers blocks ahead of their calls, with hooks beside those of torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from omni_hsdp.fsdp_internals import forget_order, initialise_root
from omni_hsdp.gather_policy import GatherPolicy
from omni_hsdp.grad_flags import GradFlags


class Sharded(Protocol):
    """What this module uses of `torch.distributed.fsdp.FSDPModule`."""

    def unshard(self, async_op: bool = False) -> Any:
        """Gather, or start to."""

    def reshard(self) -> None:
        """Give up what is gathered."""

    def reset_iter_state(self) -> None:
        """Forget a forward that failed."""

    def set_reshard_after_forward(self, value: bool, recurse: bool = True) -> None:
        """Whether each forward ends with `reshard`."""


class Gatherer:
    """Gathers the blocks of one model.

    torch gathers a block when it is called, and on gloo its own prefetch waits for each block
    too. Here a block that is about to compute starts the gathering of those that were called
    after it the last time.

    Args:
        model: The model, sharded.
        blocks: Its sharded blocks, by name, in the order of ``named_modules``.
        policy: When they are gathered.
        flags: Of the gathered weights.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: dict[str, nn.Module],
        policy: GatherPolicy,
        flags: GradFlags,
    ) -> None:
        self._model = model
        self._blocks = list(blocks.values())
        self._names = list(blocks)
        self._expected = _siblings(self._names)
        self._flags = flags
        self._order: list[int] = []
        self._called: list[int] = []
        self._pending: dict[int, Any] = {}
        self._has_buffers: set[nn.Module] = set()
        self._depth = 0
        self._lost = False
        self._complete = True
        self._last: int | None = None
        self._all_here = False  # after a forward that gave nothing up
        self._handles: list[RemovableHandle] = []
        self._policy = policy
        self._attach()
        self.policy = policy

    @property
    def policy(self) -> GatherPolicy:
        """When blocks are gathered."""
        return self._policy

    @policy.setter
    def policy(self, policy: GatherPolicy) -> None:
        self._policy = policy
        if not self._depth:
            self._follow_policy()
            self.release()

    @property
    def gathered(self) -> bool:
        """Whether everything is gathered until `leave`."""
        return self._depth > 0

    @property
    def lost(self) -> bool:
        """Whether a forward failed since `enter`, which gave up what was gathered."""
        return self._lost

    def enter(self) -> None:
        """Gather everything; if that fails, all is as before."""
        if self._depth:
            self._depth += 1
            return
        self._lost = False
        try:
            self._gather_all()
        except BaseException:
            self._follow_policy()
            with torch.inference_mode(False), torch.no_grad():
                self.release()
            raise
        self._depth = 1

    def _gather_all(self) -> None:
        """Gather everything, the next block while one is put together."""
        modules = [self._model, *self._blocks]
        for module in modules:
            _sharded(module).set_reshard_after_forward(False, recurse=False)
        with torch.inference_mode(False), torch.no_grad():
            handle = _sharded(modules[0]).unshard(async_op=True)
            for following in modules[1:]:
                try:
                    ahead = _sharded(following).unshard(async_op=True)
                finally:
                    handle.wait()  # also where the next one fails: it is under way
                handle = ahead
            handle.wait()
        self._all_here = True

    def leave(self) -> None:
        """Give everything up, at the end of the outermost `enter`."""
        self._depth -= 1
        if not self._depth:
            self._follow_policy()
            self.release()

    def release(self) -> None:
        """Give up all weights but this rank's share."""
        if not self._complete:
            self._recover()
        self._drop_pending()
        self._all_here = False
        for module in (*self._blocks, self._model):
            _sharded(module).reshard()

    def detach(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    # -- hooks -----------------------------------------------------------------------------

    def _attach(self) -> None:
        keep = self._handles.append
        model = self._model
        keep(model.register_forward_pre_hook(_eager(self._begin), prepend=True))
        keep(model.register_forward_pre_hook(_eager(lambda *_: self._flags.set(""))))
        for index, block in enumerate(self._blocks):
            ready = partial(self._make_buffers, block)
            keep(block.register_forward_pre_hook(_eager(ready), prepend=True))
            # After torch's own hook: what it waited for is there, so two blocks at most are.
            keep(block.register_forward_pre_hook(_eager(self._calls(index))))
        keep(model.register_forward_hook(_eager(self._end)))
        keep(model.register_forward_hook(_eager(self._after_failure), always_call=True))

    def _begin(self, *_: Any) -> None:
        if not self._complete:  # an exception that runs no hooks, such as KeyboardInterrupt
            self._recover()
        self._called = []
        self._complete = False
        self._make_buffers(self._model)
        # torch would keep what it received, beside the weights, until the first block is there.
        _sharded(self._model).unshard(async_op=True)

    def _make_buffers(self, module: nn.Module, *_: Any) -> None:
        """Gather a module for the first time, if that must not be left to torch.

        The memory that is gathered into is made then, once for all. Made in inference mode, it
        could not be written to outside of it.
        """
        initialise_root(self._model)  # else torch takes a block that is called first for it
        if torch.is_inference_mode_enabled() and module not in self._has_buffers:
            with torch.inference_mode(False), torch.no_grad():
                _sharded(module).unshard()
        self._has_buffers.add(module)

    def _calls(self, index: int) -> Callable[..., None]:
        def called(*_: Any) -> None:
            self._flags.set(self._names[index])
            if self._complete:  # a block that is called on its own
                return
            self._called.append(index)
            self._pending.pop(index, None)
            if self._all_here:
                return
            for following in self._following(index):
                if following not in self._pending and following != index:
                    handle = _sharded(self._blocks[following]).unshard(async_op=True)
                    self._pending[following] = handle

        return called

    def _following(self, index: int) -> list[int]:
        """The blocks to gather ahead, the next one first."""
        ahead = self._policy.prefetch
        if not self._order:
            return [i for i in self._expected[index][:ahead] if i not in self._called]
        position = len(self._called) - 1
        if self._order[position : position + 1] != [index]:
            if index not in self._order:
                return []
            position = self._order.index(index)
        return self._order[position + 1 : position + 1 + ahead]

    def _end(self, *_: Any) -> None:
        self._complete = True
        forget_order((self._model, *self._blocks))
        self._flags.clear()
        self._drop_pending()
        self._order = self._called
        self._all_here = self._depth > 0 or self._policy.keep == "all"
        last = self._order[-1] if self._order else None
        if self._policy.keep == "last" and last != self._last and not self._depth:
            if self._last is not None:
                _sharded(self._blocks[self._last]).reshard()
            self._last = last
            self._follow_policy()

    def _after_failure(self, *_: Any) -> None:
        if not self._complete:
            self._recover()

    def _recover(self) -> None:
        """After a forward that raised: torch's record of it, and what was gathered, is undone."""
        self._complete = True
        self._lost = self._depth > 0
        self._pending.clear()
        self._all_here = False
        self._flags.clear()
        _sharded(self._model).reset_iter_state()

    def _drop_pending(self) -> None:
        """Give up blocks that were gathered for a call that did not come."""
        with torch.inference_mode(False), torch.no_grad():
            while self._pending:
                index, handle = self._pending.popitem()
                handle.wait()
                _sharded(self._blocks[index]).reshard()

    def _follow_policy(self) -> None:
        keep = self._policy.keep
        for index, block in enumerate(self._blocks):
            kept = keep == "all" or (keep == "last" and index == self._last)
            _sharded(block).set_reshard_after_forward(not kept, recurse=False)
        _sharded(self._model).set_reshard_after_forward(keep != "all", recurse=False)


def _siblings(names: list[str]) -> list[list[int]]:
    """For each block, those that follow it in the list in which it stands."""
    parents = [name.rpartition(".")[0] for name in names]
    return [
        [other for other in range(index + 1, len(names)) if parents[other] == parents[index]]
        for index in range(len(names))
    ]


def _eager(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that torch.compile does not trace, as it does not trace torch's own."""
    eager: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return eager


def _sharded(module: nn.Module) -> Sharded:
    return cast("Sharded", module)
