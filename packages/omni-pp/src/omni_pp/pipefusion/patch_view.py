"""The tokens that a forward works on: of a patch of an image, or of all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from omni_group_coordinator import ParallelError
from omni_pp.pipefusion.kv_cache import KeyValueCache
from omni_pp.pipefusion.patch_plan import (
    CARRIED_TEXT,
    Count,
    Cut,
    Order,
    Part,
    Parts,
    Text,
)
from omni_pp.pipefusion.patchwise import PatchwiseTensor, real_of, values_of
from omni_pp.pipefusion.token_layout import TokenLayout
from omni_pp.pipefusion.token_shares import TokenShares


class PatchedCall:
    """What the patches of one call share.

    Attributes:
        tokens: Image tokens of the whole.
        text: Text tokens of the whole.
        cache: Keys and values of the step before.
        layout: How tokens lie in what is denoised and in the result, of which a patch is enough;
            ``None``: both are needed whole.
        heads: What the head gave for each patch so far.
        image: What of the denoised tensor has arrived so far, in its flat form; ``None``: nothing.
        cut: Names of the model's arguments of which each patch has its own part.
        computed: By module: its outputs of the first patch, in order.
        masks: By name of the attention: the mask of all keys, of the first patch.
    """

    def __init__(
        self, tokens: int, text: int, cache: KeyValueCache, layout: TokenLayout | None = None
    ) -> None:
        self.tokens = tokens
        self.text = text
        self.cache = cache
        self.layout = layout
        self.heads: list[Tensor] = []
        self.image: Tensor | None = None
        self.cut: set[str] = set()
        self.computed: dict[tuple[int, str], list[Any]] = {}
        self.masks: dict[str, Tensor] = {}


class PatchView:
    """One patch of a call, or all of it, of which the ranks of a group may each have a share.

    Args:
        call: The call.
        shares: Which image tokens each rank has.
        index: Which patch it is.

    Attributes:
        call, shares, index: As given.
        start: First image token of this rank.
        stop: One past the last image token of this rank.
        chunk: Index of the chunk that is under way.
        attended: Names of the attention modules that were called in it.
    """

    def __init__(self, call: PatchedCall, shares: TokenShares, index: int = 0) -> None:
        self.call, self.shares, self.index = call, shares, index
        self.start, self.stop = shares.own
        self.chunk = 0
        self.attended: set[str] = set()
        self.seen: dict[str, int] = {}
        self._made: dict[tuple[int, Part], tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """Image tokens of this rank."""
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether this rank has all image tokens."""
        return self.length == self.call.tokens

    @property
    def is_exact(self) -> bool:
        """Whether the ranks have all image tokens together."""
        return self.is_first and self.is_last

    @property
    def is_first(self) -> bool:
        """Whether no patch comes before this one: so all text goes with it."""
        return self.shares.start == 0

    @property
    def is_last(self) -> bool:
        """Whether no patch comes after this one."""
        return self.shares.stop == self.call.tokens

    @property
    def has_text(self) -> bool:
        """Whether all text goes with the tokens of this rank."""
        return self.start == 0

    def enter(self, chunk: int) -> None:
        """A chunk begins with this patch."""
        self.chunk = chunk
        self.attended.clear()
        self.seen.clear()
        self._made.clear()

    def take(self, value: Any, parts: Parts, where: str) -> Any:
        """This patch's part of an argument.

        Args:
            value: A tensor, a tuple or list of tensors, a number, or None.
            parts: What is cut.
            where: For messages.

        Raises:
            ParallelError: A tensor has another length than that of the whole image.
        """
        if value is None or self.is_whole or isinstance(value, PatchwiseTensor):
            return value
        if isinstance(value, tuple | list):
            each = parts if isinstance(parts, tuple) else (parts,) * len(value)
            items = [
                item if part is None else self.take(item, part, where)
                for item, part in zip(value, each, strict=True)
            ]
            return type(value)(items)
        if isinstance(parts, Count):
            return min(max(value - self.start, 0), self.length)
        if not isinstance(value, Tensor) or isinstance(parts, tuple | Count):
            msg = f"{where} is a {type(value).__name__}; PipeFusion expects a tensor"
            raise ParallelError(msg)
        key = id(value), parts
        if key not in self._made:  # blocks are all given the same one, which is kept alive here
            self._made[key] = value, self._cut(value, parts, where)
        return self._made[key][1]

    def _cut(self, value: Tensor, part: Cut | Text, where: str) -> Tensor:
        if isinstance(part, Text):
            return value.narrow(part.dim, 0, self.text_of(value.shape[part.dim]))
        if (part.ndim is not None and value.ndim != part.ndim) or value.shape[part.dim] == 1:
            return value
        dim, tokens = part.dim % value.ndim, self.call.tokens
        text = value.shape[dim] - tokens
        if text < 0 or (text and part.order == "image"):
            msg = (
                f"{where} has shape {tuple(value.shape)}; PipeFusion expects {tokens} image tokens "
                f"in dimension {dim}"
            )
            raise ParallelError(msg)
        before = part.order == "text first"
        image = value.narrow(dim, (text if before else 0) + self.start, self.length)
        if not text:
            return image
        words = value.narrow(dim, 0 if before else tokens, self.text_of(text))
        return torch.cat([words, image] if before else [image, words], dim)

    def text_of(self, text: int) -> int:
        """How many of so many text tokens go with the tokens of this rank."""
        return text if self.has_text else min(text, CARRIED_TEXT)

    def image(self, value: PatchwiseTensor, *, is_read: bool) -> Tensor:
        """What the model is called with in place of a tensor that arrives patch by patch.

        Args:
            value: The tensor.
            is_read: Whether this patch of it matters; otherwise nothing is waited for.
        """
        call, index = self.call, self.index
        values, layout = values_of(value), call.layout
        if layout is None or values is None:  # somebody has looked at it since
            real = real_of(value)
            if layout is None or not layout.is_packed:
                return real
            return self.shares.own_part(layout.patch(real, index), layout.axis)
        if layout.is_packed:
            if is_read:
                return self.shares.own_part(values.patch(index), layout.axis)
            shape = layout.patch_shape(value.shape, index)
            shape[layout.axis] = self.length
            return torch.zeros(shape, dtype=value.dtype, device=value.device)
        if call.image is None:
            shape = layout.flat_shape(value.shape)
            call.image = torch.zeros(shape, dtype=value.dtype, device=value.device)
        if is_read:
            layout.patch(call.image, index).copy_(values.patch(index))
        return layout.whole(call.image)

    def result(self, output: Tensor, order: Order) -> Tensor | None:
        """What the head gives in place of its output of this patch.

        Returns:
            ``None``: the forward ends here, for more patches belong to the result.
        """
        layout = self.call.layout
        if layout is None:
            return self.join_heads(output, order)
        patch = self._image_tokens(output, order)
        if layout.is_packed:
            return patch
        if not self.call.heads:
            shape = (output.shape[0], self.call.tokens, *output.shape[2:])
            self.call.heads.append(output.new_zeros(shape))
        (whole,) = self.call.heads
        whole.narrow(1, self.shares.start, self.shares.length).copy_(patch)
        return whole

    def _image_tokens(self, output: Tensor, order: Order) -> Tensor:
        """Those of the patch, of all ranks."""
        text = output.shape[1] - self.length
        own = output.narrow(1, text if order == "text first" else 0, self.length)
        return self.shares.joined(own, 1)

    def join_heads(self, output: Tensor, order: Order) -> Tensor | None:
        """Keep the head's output of this patch, ``(batch, tokens, channels)``, without text.

        Returns:
            That of all image tokens once this is the last patch, else None.
        """
        heads = self.call.heads
        heads.append(self._image_tokens(output, order))
        return torch.cat(heads, dim=1) if self.is_last else None


def taken(
    view: PatchView,
    parts: Mapping[str, Parts],
    names: Mapping[str, int],
    given: tuple[tuple[Any, ...], Mapping[str, Any]],
    where: str,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, with this patch's parts in place of those of the whole.

    Args:
        view: The patch.
        parts: By name, what is cut.
        names: Positions of the parameters, by name.
        given: Positional and named arguments.
        where: Name of the module, for messages.
    """
    args, kwargs = list(given[0]), dict(given[1])
    for name, part in parts.items():
        index = names.get(name)
        if index is None:
            continue
        if index < len(args):
            args[index] = view.take(args[index], part, f"{name} of {where}")
        elif name in kwargs:
            kwargs[name] = view.take(kwargs[name], part, f"{name} of {where}")
    return tuple(args), kwargs
