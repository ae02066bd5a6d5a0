"""One contiguous run of blocks, computed by the model's own forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_pp.partition.block_table import BlockTable
from omni_pp.partition.families import BLOCK_INDEXED_ARGUMENTS, SHARED_HOOKS


class _AbandonedError(BaseException):
    """Ends a forward at the last block of a chunk; no ``except Exception`` of a model stops it."""

    def __init__(self, tap: _Tap) -> None:
        super().__init__()
        self.tap = tap


class _InPlaceOf(nn.Module):
    """Stands in the place of a block, whose attributes a forward may ask for."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self.__dict__["_replaced"] = replaced  # not a child: its weights are elsewhere

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_replaced"], name)


class _Stub(_InPlaceOf):
    """Returns what the block that it replaces returned on another stage."""

    def __init__(self, replaced: nn.Module, receive: Callable[[], Any], name: str) -> None:
        super().__init__(replaced)
        self.__dict__.update(receive=receive, name=name, calls=0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["calls"] += 1
        if self.calls > 1:
            msg = f"the forward calls {self.name} more than once, so it cannot be cut into stages"
            raise ParallelError(msg)
        return self.receive()


class _Tap(_InPlaceOf):
    """Computes a block, keeps its output and abandons the forward."""

    def __init__(self, block: nn.Module, name: str) -> None:
        super().__init__(block)
        # A child after all: a forward may look for its layers, to scale LoRA for one.
        self._modules["tapped"] = block
        self.__dict__.update(name=name, output=None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["output"] = self._modules["tapped"](*args, **kwargs)  # type: ignore[misc]
        raise _AbandonedError(self)


class Chunk:
    """One contiguous run of blocks that a stage holds.

    Attributes:
        index: From 0 to ``stages * virtual - 1``, in order of execution; chunk c is held by stage
            ``c % stages``.
        blocks: Indices of its blocks in the row of all lists.
        is_first: Whether nothing arrives from another chunk.
        is_last: Whether the model's result comes out.
    """

    def __init__(self, model: nn.Module, table: BlockTable, index: int, blocks: range) -> None:
        self.index, self.blocks = index, blocks
        self.is_first = blocks.start == 0
        self.is_last = blocks.stop == len(table)
        self._table = table
        self._class = type(model)
        self._parameters = list(inspect.signature(type(model).forward).parameters)[1:]

    def __repr__(self) -> str:
        first, last = self._table.name(self.blocks[0]), self._table.name(self.blocks[-1])
        return f"Chunk({self.index}: {first} to {last})"

    def run(
        self,
        forward: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        receive: Callable[[], Any] | None,
        send: Callable[[Any], None] | None,
    ) -> Any:
        """Compute this chunk by a call of the model in which only its blocks stand.

        Args:
            forward: Calls the model, for example as its class does it, hooks included.
            args: For ``forward``. Lists and dicts are copied: models take entries out of them, and
                another chunk gets the same ones.
            kwargs: As ``args``.
            receive: Gives what the last block of the previous chunk returned, any tree of tensors.
                Called once, when the loop over the blocks arrives there, so that embedders overlap
                with the transfer. Not called in the first chunk, which may give None.
            send: Gets what the last block returned, when the forward has been left. Not called in
                the last chunk, which may give None.

        Returns:
            What ``forward`` returned in the last chunk, None in others.

        Raises:
            ParallelConfigError: An argument or a hook depends on the position of a block among
                all, or ``receive`` or ``send`` is missing.
            ParallelError: The forward did not go through the blocks of this chunk, or another
                chunk is running.
        """
        self._refuse_arguments(args, kwargs)
        self._refuse_hooks()
        if (receive is None and not self.is_first) or (send is None and not self.is_last):
            missing = "receive" if receive is None and not self.is_first else "send"
            msg = f"chunk {self.index} needs {missing}: it is not the first and the last at once"
            raise ParallelConfigError(msg)
        first, last = self.blocks.start, self.blocks.stop - 1
        contents = {index: self._table.block(index) for index in self.blocks}
        stub = tap = None
        if receive is not None and not self.is_first:
            replaced = self._table.block(first - 1)
            contents[first - 1] = stub = _Stub(replaced, receive, self._table.name(first - 1))
        if not self.is_last:
            contents[last] = tap = _Tap(contents[last], self._table.name(last))
        result, reached = self._call(forward, args, kwargs, contents, tap)
        if (tap is not None and not reached) or (stub is not None and not stub.calls):
            msg = (
                f"the forward of {self._class.__name__} ended without going through all blocks of "
                f"{self!r}; a hook may have answered in its place"
            )
            raise ParallelError(msg)
        if tap is None:
            return result
        if send is not None:
            send(tap.output)
        return None

    def _call(
        self,
        forward: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        contents: Mapping[int, nn.Module],
        tap: _Tap | None,
    ) -> tuple[Any, bool]:
        with self._table.installed(contents):
            try:
                given = {name: _copied(value) for name, value in kwargs.items()}
                return forward(*map(_copied, args), **given), False
            except _AbandonedError as left:
                if left.tap is not tap:
                    raise
                return None, True

    def _refuse_arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        given = dict(zip(self._parameters, args, strict=False)) | dict(kwargs)
        for name, value in given.items():
            if name in BLOCK_INDEXED_ARGUMENTS and _is_given(value):
                msg = (
                    f"{self._class.__name__} in pipeline stages cannot take {name!r}: "
                    f"{BLOCK_INDEXED_ARGUMENTS[name]}, of which a stage holds a part. Legal: None"
                )
                raise ParallelConfigError(msg)

    def _refuse_hooks(self) -> None:
        for index in self.blocks:
            registry = getattr(self._table.block(index), "_diffusers_hook", None)
            for hook in registry.hooks.values() if registry is not None else ():
                if type(hook).__name__ in SHARED_HOOKS:
                    msg = (
                        f"{self._table.name(index)} has a {type(hook).__name__}, by which one "
                        "block decides for all others, and these are on other ranks; call "
                        "disable_cache() of the model first"
                    )
                    raise ParallelConfigError(msg)


def _is_given(value: Any) -> bool:
    if value is None or value is False:
        return False
    if isinstance(value, Tensor) or not hasattr(value, "__len__"):
        return True
    return len(value) > 0


def _copied(value: Any) -> Any:
    """With plain lists and dicts copied, and what is in them as it is."""
    if type(value) is dict:
        return {key: _copied(one) for key, one in value.items()}
    if type(value) is list:
        return [_copied(one) for one in value]
    return value
