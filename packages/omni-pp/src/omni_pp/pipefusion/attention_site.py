"""The attention calls of one module in a block, with keys and values of the step before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_parallel_state.rebinding import is_dispatch, is_rebound, subclass_with
from omni_pp.pipefusion.patch_plan import Order
from omni_pp.pipefusion.patch_view import PatchView

Undo = Callable[[], None]


class AttentionSite:
    """What a module calls in place of torch's attention, or of diffusers' dispatcher to kernels.

    A whole call fills the cache and is the original one. A patch's call attends to the keys of
    the whole: fresh ones of its own tokens, of the text and of patches before it in this step, and
    those of the step before of the patches after it (Fang et al., arXiv 2405.14430). Those of the
    text are what the first patch of this step made of them.

    Args:
        name: Name of the module in the model.
        order: Where text lies among its keys.
        keys_are_valid: Whether a mask of a patch's keys hides no image token.
        view: Gives the patch that is under way, if any.
    """

    def __init__(
        self,
        name: str,
        order: Order,
        keys_are_valid: bool,
        view: Callable[[], PatchView | None],
    ) -> None:
        self._name = name
        self._order = order
        self._keys_are_valid = keys_are_valid
        self._view = view
        self._dispatch: Callable[..., Tensor] | None = None

    def replacement(self, value: Any) -> Any:
        """What the module calls in place of a function."""
        if value is scaled_dot_product_attention:
            return self.scaled_dot_product_attention
        if is_dispatch(value):
            self._dispatch = value
            return self.dispatch
        return value

    def scaled_dot_product_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        """As torch's function: ``(batch, heads, sequence, head_dim)``."""
        options |= {"dropout_p": dropout_p, "is_causal": is_causal}
        key, value, attn_mask = self._widened(query, key, value, attn_mask, 2, is_causal)
        return scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)

    def dispatch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *args: Any,
        **options: Any,
    ) -> Tensor:
        """As diffusers' function: ``(batch, sequence, heads, head_dim)``."""
        if self._dispatch is None:
            msg = f"{self._name}: dispatch was called without an original"
            raise ParallelError(msg)
        key, value, mask = self._widened(query, key, value, attn_mask, 1, is_causal)
        return self._dispatch(query, key, value, mask, dropout_p, is_causal, *args, **options)

    def _widened(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dim: int,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of the whole, and their mask."""
        view = self._view()
        if view is None or query.shape[dim] != key.shape[dim]:
            return key, value, mask
        if is_causal:
            msg = f"{self._name} attends causally, which PipeFusion cannot"
            raise ParallelConfigError(msg)
        view.attended.add(self._name)
        text = key.shape[dim] - view.length
        if text < 0 or (text and self._order == "image"):
            msg = (
                f"{self._name} has {key.shape[dim]} keys of a patch of {view.length} image tokens; "
                f"PipeFusion expects {'these alone' if self._order == 'image' else 'text beside'}"
            )
            raise ParallelError(msg)
        fresh, cache = (key.detach(), value.detach()), view.call.cache
        if view.is_whole:
            room = cache.room(self._name, fresh, dim, key.shape[dim])
            for kept, one in zip(room, fresh, strict=True):
                kept.copy_(one)
            return key, value, mask
        if view.is_exact:
            words = 0 if self._order == "image" else view.call.text
            pair = cache.room(self._name, fresh, dim, view.call.tokens + words)
        else:
            pair = cache.kept(self._name)
        self._renew(pair, fresh, dim, view, text)
        return *pair, None if mask is None else self._mask(mask, view, pair[0].shape[dim], text)

    def _renew(
        self,
        pair: tuple[Tensor, Tensor],
        fresh: tuple[Tensor, Tensor],
        dim: int,
        view: PatchView,
        text: int,
    ) -> None:
        """Put what all ranks have of a patch in its place in the whole."""
        words = pair[0].shape[dim] - view.call.tokens
        if text != view.text_of(words):
            msg = (
                f"{self._name} has {text} text tokens in a patch; PipeFusion expects "
                f"{view.text_of(words)} of the {words} of the exact steps"
            )
            raise ParallelError(msg)
        if not view.has_text:  # the text that is carried along is not what it stands for
            at = dim, text if self._order == "text first" else 0, view.length
            fresh = fresh[0].narrow(*at), fresh[1].narrow(*at)
        pieces = view.shares.of_all(fresh, dim, words if view.is_first else 0)
        for (start, _), piece in zip(view.shares.spans, pieces, strict=True):
            for kept, one in zip(pair, piece, strict=True):
                self._write(kept, one, dim, start, view.call.tokens)

    def _write(self, kept: Tensor, fresh: Tensor, dim: int, start: int, tokens: int) -> None:
        """Put image tokens from one on in their place, and the text that goes with the first."""
        words, before = kept.shape[dim] - tokens, self._order == "text first"
        text = words if start == 0 else 0
        length = fresh.shape[dim] - text
        image = kept.narrow(dim, (words if before else 0) + start, length)
        image.copy_(fresh.narrow(dim, text if before else 0, length))
        if text:
            there = kept.narrow(dim, 0 if before else tokens, text)
            there.copy_(fresh.narrow(dim, 0 if before else length, text))

    def _mask(self, mask: Tensor, view: PatchView, keys: int, text: int) -> Tensor:
        """The mask of all keys."""
        if mask.ndim > 2 and mask.shape[-2] != 1:
            msg = f"{self._name} has a mask of shape {tuple(mask.shape)}; PipeFusion: one of keys"
            raise ParallelError(msg)
        if mask.shape[-1] == keys:
            return mask
        if mask.shape[-1] != text + view.length or not self._keys_are_valid:
            msg = f"{self._name} has a mask of {mask.shape[-1]} keys; PipeFusion: one of all {keys}"
            raise ParallelError(msg)
        masks = view.call.masks
        if view.is_first or self._name not in masks:
            shown = mask.new_full((), True if mask.dtype == torch.bool else 0)
            rest = shown.expand(*mask.shape[:-1], view.call.tokens)
            before = self._order == "text first"
            words = mask[..., :text] if before else mask[..., view.length :]
            if view.is_first and not view.has_text:
                words = mask.new_empty(*mask.shape[:-1], keys - view.call.tokens)
            if view.is_first:
                words = view.shares.from_first(words)
            masks[self._name] = torch.cat([words, rest] if before else [rest, words], dim=-1)
        return masks[self._name]


def take_over(module: nn.Module, site: AttentionSite | None, where: str) -> Undo:
    """Have a module's attention calls go through a site.

    Args:
        module: Calls attention itself, or has a ``processor`` that does.
        site: The site; ``None``: only look whether there are such calls.
        where: Name of the module, for messages.

    Returns:
        Gives the calls back.

    Raises:
        ParallelConfigError: It calls no attention that is known, or was taken over already.
    """
    processor = getattr(module, "processor", None)
    owner: Any = processor if callable(processor) else module
    if is_rebound(owner):
        msg = (
            f"the attention of {where} was taken over before PipeFusion, as sequence parallelism "
            "does; remove that handle: PipeFusion shares tokens over the sp group itself"
        )
        raise ParallelConfigError(msg)
    found: list[object] = []

    def replace(value: Any) -> Any:
        if value is scaled_dot_product_attention or is_dispatch(value):
            found.append(value)
            return value if site is None else site.replacement(value)
        return value

    cls = type(owner)
    subclass = subclass_with(cls, replace)
    if not found:
        msg = (
            f"the attention of {where} is not known: {cls.__name__} calls neither torch's "
            "scaled_dot_product_attention nor diffusers' dispatch_attention_fn by these names; "
            "PipeFusion would attend to a patch alone"
        )
        raise ParallelConfigError(msg)
    if site is None or subclass is None:
        return lambda: None
    if owner is module:
        module.__class__ = subclass
        return lambda: setattr(module, "__class__", cls)
    twin = copy.copy(owner)  # several modules may share a processor
    twin.__class__ = subclass
    module.processor = twin

    def give_back() -> None:
        if module.processor is twin:
            owner.__dict__.update(twin.__dict__)  # such as the kernel that was chosen since
            module.processor = owner

    return give_back
