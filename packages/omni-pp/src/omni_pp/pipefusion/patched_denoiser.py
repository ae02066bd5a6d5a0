"""One denoiser whose calls go through the stages in patches: what is put on its modules here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_parallel_state.denoising.structure import Plain, tensor_specs, tensors_in
from omni_pp.partition import Chunk, PartitionedModel
from omni_pp.partition.families import BLOCK_INDEXED_ARGUMENTS
from omni_pp.pipefusion.attention_site import AttentionSite, Undo, take_over
from omni_pp.pipefusion.computed_once import (
    Once,
    OnceForWords,
    OnceInAStep,
    modules_at,
    modules_named,
)
from omni_pp.pipefusion.known_plans import REFUSED_OPTIONS
from omni_pp.pipefusion.patch_plan import Order, PatchPlan
from omni_pp.pipefusion.patch_view import PatchView, taken
from omni_pp.pipefusion.patchwise import PatchwiseTensor
from omni_pp.pipefusion.token_layout import TokenLayout

_Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


class _HeadReachedError(BaseException):
    """Ends a forward at the head, for more patches follow; no ``except Exception`` stops it."""

    def __init__(self, view: PatchView) -> None:
        super().__init__()
        self.view = view


class PatchedDenoiser:
    """Runs the chunks of a denoiser on patches, by the model's own forward.

    Hooks on the blocks, the head and the costly modules before the blocks, and the attention of
    the blocks, do what they were made for while a patch is under way, and nothing else.

    Args:
        name: For messages.
        partition: The model's chunks.
        plan: How it is cut along the image tokens.
    """

    def __init__(self, name: str, partition: PartitionedModel, plan: PatchPlan) -> None:
        self.name = name
        self.plan = plan
        self._model = partition.model
        self._partition = partition
        self._names = positions(partition.model)
        self._view: PatchView | None = None
        self._undo: list[Undo] = []
        self._sites: dict[int, set[str]] = {chunk.index: set() for chunk in partition.chunks}

    # -- what is put on the modules --------------------------------------------------------

    def install(self) -> None:
        """Put everything on the modules.

        Raises:
            ParallelConfigError: A module is missing, or its attention is not known.
        """
        blocks = self._partition.blocks_of(self._partition.stage)
        indices = sorted(index for chunk in self._partition.chunks for index in chunk.blocks)
        for index, (name, block) in zip(indices, blocks, strict=True):
            chunk = next(one for one in self._partition.chunks if index in one.blocks)
            self._hook_block(name, block, is_first=index == 0)
            for site, order in sites_of(self.plan, name, block):
                self._sites[chunk.index].add(site)
                where = block.get_submodule(site.removeprefix(f"{name}."))
                attention = AttentionSite(site, order, self.plan.keys_are_valid, lambda: self._view)
                self._undo.append(take_over(where, attention, site))
        for head in modules_named(self._model, self.plan.head):
            self._undo.append(head.register_forward_hook(self._at_head).remove)
        self._compute_once()

    def _compute_once(self) -> None:
        plan = self.plan
        for patterns, kind in ((plan.once, Once), (plan.once_in_a_step, OnceInAStep)):
            self._replace(patterns, kind)
        self._replace(plan.words, OnceForWords)

    def _replace(self, patterns: Iterable[str], kind: type[Once]) -> None:
        for pattern in patterns:
            for module in modules_at(self._model, pattern):
                self._undo.append(kind(module, lambda: self._view).undo)

    def _hook_block(self, name: str, block: nn.Module, *, is_first: bool) -> None:
        names = positions(block)
        parts = {**self.plan.blocks, **(self.plan.first if is_first else {})}

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[Any, Any] | None:
            view = self._view
            return None if view is None else taken(view, parts, names, (args, kwargs), name)

        self._undo.append(block.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _at_head(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        view = self._view
        if view is None or view.is_whole:  # of a whole call, text is left as it is
            return None
        whole = view.result(output, self.plan.head_order)
        if whole is None:
            raise _HeadReachedError(view)
        return whole

    def remove(self) -> None:
        """Take everything off."""
        while self._undo:
            self._undo.pop()()

    # -- a call ----------------------------------------------------------------------------

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, defaults of plain numbers included."""
        found = dict(zip(self._names, args, strict=False)) | dict(kwargs)
        for name, parameter in inspect.signature(self._model.forward).parameters.items():
            if isinstance(parameter.default, int):
                found.setdefault(name, parameter.default)
        return found

    def count(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """How many image tokens and text tokens a call has.

        Raises:
            ParallelConfigError: An argument cannot be cut into patches.
        """
        given = self.named(args, kwargs)
        refused = dict(self.plan.refused)
        for name, why in BLOCK_INDEXED_ARGUMENTS.items():
            refused.setdefault(name, why)
        options = [value for value in given.values() if isinstance(value, dict)]
        for entries, reasons in ((given, refused), *((one, REFUSED_OPTIONS) for one in options)):
            for name, why in reasons.items():
                if _is_given(entries.get(name)):
                    msg = f"{self.name} in patches cannot take {name!r}: {why}. Legal: None"
                    raise ParallelConfigError(msg)
        tokens = self.plan.tokens.count(given, getattr(self._model, "config", None))
        return tokens, 0 if self.plan.text is None else self.plan.text.count(given)

    def layout(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Plain,
        bounds: tuple[int, ...],
    ) -> TokenLayout | None:
        """How tokens lie in what a call denoises and in its result; ``None``: not alike.

        Args:
            args: Positional arguments of the call.
            kwargs: Named ones.
            result: Everything about its result but the elements; ``None`` if that is not known.
            bounds: Tokens at which patches begin, and their number at the end.
        """
        if result is None or not self.plan.is_local:
            return None
        given, config = self.named(args, kwargs), getattr(self._model, "config", None)
        found = self.plan.tokens.layout(given, config, bounds)
        shapes = [torch.Size(shape) for shape, _ in tensor_specs(result)]
        ndim = len(given[self.plan.tokens.argument].shape) if found is not None else 0
        fits = found is not None and len(shapes) == 1 and found.fits(shapes[0])
        return found if fits and len(shapes[0]) == ndim else None

    def around(
        self, view: PatchView, chunk: Chunk, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        """The model's forward, on a patch, for one chunk."""
        return partial(self._run, view, chunk, forward)

    def _run(
        self, view: PatchView, chunk: Chunk, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        view.enter(chunk.index)
        given = args, kwargs
        args, kwargs = taken(view, self.plan.call, self._names, given, self.name)
        if view.index == 0:
            view.call.cut |= self._changed(given, (args, kwargs))
        args = tuple(_shown(view, chunk, value) for value in args)
        kwargs = {name: _shown(view, chunk, value) for name, value in kwargs.items()}
        self._view = view
        try:
            result = forward(*args, **kwargs)
        except _HeadReachedError as reached:
            if reached.view is not view:
                raise
            result = None
        except Exception:
            raise
        except BaseException:  # the chunk's last block was computed
            self._check(view, chunk)
            raise
        finally:
            self._view = None
            if view.is_last:
                view.call.computed.clear()
        self._check(view, chunk)
        layout = view.call.layout
        if layout is None or result is None:
            return result
        (whole,) = tensors_in(result)
        return whole if layout.is_packed else layout.patch(layout.flat(whole), view.index)

    def _changed(self, old: _Arguments, new: _Arguments) -> set[str]:
        """Names of the arguments that were cut."""
        before = dict(zip(self._names, old[0], strict=False)) | dict(old[1])
        after = dict(zip(self._names, new[0], strict=False)) | dict(new[1])
        return {name for name, value in after.items() if value is not before[name]}

    def _check(self, view: PatchView, chunk: Chunk) -> None:
        missed = sorted(self._sites[chunk.index] - view.attended)
        if missed:
            msg = (
                f"{missed[0]} of {self.name} attended otherwise than when PipeFusion was applied "
                "(was its processor replaced?), so it would see a patch alone; remove the handle, "
                "and apply again"
            )
            raise ParallelError(msg)


def _shown(view: PatchView, chunk: Chunk, value: Any) -> Any:
    """An argument with what has arrived of it; what is denoised is read by the first chunk."""
    if not isinstance(value, PatchwiseTensor):
        return value
    return view.image(value, is_read=chunk.is_first)


def positions(module: nn.Module) -> dict[str, int]:
    """Positions of a module's parameters, by name."""
    inner = getattr(module, "_orig_mod", module)
    return {name: index for index, name in enumerate(inspect.signature(inner.forward).parameters)}


def sites_of(plan: PatchPlan, name: str, block: nn.Module) -> Iterator[tuple[str, Order]]:
    """The attention modules of a block, with dotted names.

    Raises:
        ParallelConfigError: One that the plan names is missing.
    """
    for attribute, order in plan.attentions[name.rpartition(".")[0]].items():
        path = attribute.removesuffix("?")
        if isinstance(getattr(block, path, None), nn.Module):
            yield f"{name}.{path}", order
        elif path == attribute:
            there = ", ".join(key for key, _ in block.named_children())
            msg = f"{name} has no attention {path!r} for PipeFusion to take over; it has: {there}"
            raise ParallelConfigError(msg)


def _is_given(value: Any) -> bool:
    if value is None or value is False:
        return False
    return isinstance(value, Tensor) or not hasattr(value, "__len__") or len(value) > 0
