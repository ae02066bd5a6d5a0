"""What is to be known of a model to cut its calls along the image tokens: the entries of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from omni_group_coordinator import ParallelConfigError
from omni_pp.pipefusion.token_layout import TokenLayout

Order = Literal["image", "text first", "text last"]
"""What a sequence holds: image tokens alone, or text beside them."""


@dataclass(frozen=True)
class Cut:
    """A tensor with the tokens of the whole image, of which a patch takes its own."""

    dim: int
    """Dimension of the sequence. One that is as long as 1 is broadcast, and stays as it is."""
    order: Order = "image"
    """Whether there is text beside the image, which is cut as `Text` is."""
    ndim: int | None = None
    """Only a tensor of so many dimensions is cut; ``None``: any."""


CARRIED_TEXT = 1
"""Text tokens that go through the blocks with each patch; all go with the first one. It would be
none, but that code of models is not written for an empty text."""


@dataclass(frozen=True)
class Text:
    """A tensor with text tokens, most of which go through the blocks with the first patch alone.

    The other patches attend to the keys that the first one left.
    """

    dim: int
    """Dimension of the sequence."""


@dataclass(frozen=True)
class Count:
    """A number of leading image tokens, of which a patch has its own."""


Part = Cut | Text | Count
Parts = Part | tuple[Part | None, ...]
"""For a tensor, or for each tensor of a tuple; one entry for a tuple holds for all in it."""


@dataclass(frozen=True)
class Tokens:
    """How many image tokens a call has, by arithmetic on the shape of an argument.

    It is the product of some dimensions, each divided by a patch size, rounded up.
    """

    argument: str
    """Name of the argument: a tensor, or a list of equal ones, of which the first counts."""
    dims: tuple[int, ...] = (1,)
    """Dimensions of it."""
    sizes: tuple[str | None, ...] = ()
    """For each dimension the name of its patch size, an argument of the call or an entry of the
    model's ``config``, where it may be a tuple with one for each dimension; ``None``: 1."""
    multiple: int = 1
    """The model pads the image to a multiple of so many tokens."""

    def count(self, arguments: Mapping[str, Any], config: Any) -> int:
        """The number of image tokens of a call with these named arguments.

        Raises:
            ParallelConfigError: The samples of a list differ in shape, or it is no tensor.
        """
        value = arguments.get(self.argument)
        if isinstance(value, list):
            shapes = {tuple(item.shape) for item in value if isinstance(item, Tensor)}
            if len(shapes) != 1:
                msg = (
                    f"{self.argument} holds samples of shapes {sorted(shapes)}; PipeFusion cuts "
                    "images of one size: call the pipeline once for each"
                )
                raise ParallelConfigError(msg)
            value = value[0]
        if not isinstance(value, Tensor):
            msg = f"{self.argument} is a {type(value).__name__}; PipeFusion expects a tensor"
            raise ParallelConfigError(msg)
        total = 1
        for index, dim in enumerate(self.dims):
            size = self._size(index, arguments, config)
            total *= -(-value.shape[dim] // size)
        return -(-total // self.multiple) * self.multiple

    def layout(
        self, arguments: Mapping[str, Any], config: Any, bounds: tuple[int, ...]
    ) -> TokenLayout | None:
        """Where the tokens lie in the argument; ``None`` if not each of them has its own place.

        Args:
            arguments: Of the call, by name.
            config: Of the model.
            bounds: Tokens at which patches begin, and their number at the end.
        """
        value = arguments.get(self.argument)
        if not isinstance(value, Tensor):
            return None
        sizes = tuple(self._size(i, arguments, config) for i in range(len(self.dims)))
        lengths = tuple(value.shape[dim] for dim in self.dims)
        found = TokenLayout(self.dims, lengths, sizes, bounds)
        return found if found.fits(value.shape) else None

    def _size(self, index: int, arguments: Mapping[str, Any], config: Any) -> int:
        name = self.sizes[index] if self.sizes else None
        if name is None:
            return 1
        value = arguments[name] if name in arguments else getattr(config, name)
        value = value[index] if isinstance(value, tuple | list) else value
        return 1 if value is None else int(value)


@dataclass(frozen=True)
class TextTokens:
    """How many text tokens stand beside the image tokens, by the shape of an argument."""

    argument: str = "encoder_hidden_states"
    """Name of the argument: a tensor, or a list with one for each sample."""
    dim: int = 1
    """Dimension of it."""
    multiple: int = 1
    """The model pads the text to a multiple of so many tokens."""

    def count(self, arguments: Mapping[str, Any]) -> int:
        """The number of text tokens of a call with these named arguments."""
        value = arguments.get(self.argument)
        samples = value if isinstance(value, list) else [value]
        lengths = [one.shape[self.dim] for one in samples if isinstance(one, Tensor)]
        return -(-max(lengths, default=0) // self.multiple) * self.multiple


@dataclass(frozen=True)
class PatchPlan:
    """How a class of models is cut along its image tokens."""

    tokens: Tokens
    """How many there are."""
    attentions: Mapping[str, Mapping[str, Order]]
    """By list of blocks, then by name in the block: the self-attention over image tokens, and
    where text lies among its keys. Any other attention reads keys that every patch has whole. A
    ``?`` after a name: some blocks do without it."""
    text: TextTokens | None = None
    """How many text tokens there are in attention that is not over image tokens alone."""
    call: Mapping[str, Part] = field(default_factory=dict)
    """Arguments of the model that are cut as it is called."""
    first: Mapping[str, Part] = field(default_factory=dict)
    """Arguments of the very first block that are cut as it is called: the tokens, where the model
    itself is called with an image."""
    blocks: Mapping[str, Parts] = field(default_factory=dict)
    """Arguments of every block that has such a parameter, which the model makes of the whole."""
    head: str = "proj_out"
    """The last module that works on tokens; its outputs are put together. ``*``: the ones in a
    dict of modules."""
    head_order: Order = "image"
    """What its output holds. The model reads nothing of the text there, which is left out."""
    keys_are_valid: bool = False
    """Blocks make a mask of their own, of as many keys as they have, which hides no image token."""
    once: tuple[str, ...] = ()
    """Modules that are given the same for each patch of a call, such as those of the timestep and
    keys of the text: for the later ones they are not computed again. ``list.*``: the ones in a
    list; ``list.*.name``: those of this name in each of these. A model may lack some."""
    once_in_a_step: tuple[str, ...] = ()
    """As ``once``, unless there is a timestep for each token."""
    words: tuple[str, ...] = ()
    """As ``once``, of modules that are given nothing but text, `CARRIED_TEXT` with later patches:
    these are given what the first one's are."""
    is_local: bool = True
    """Before the blocks and after the head no token looks at others, so a patch can go in before
    the others are known."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Arguments of the model that cannot be given, and why."""
