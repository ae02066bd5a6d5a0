"""The entries of a sequence-parallel plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

REST = "*"
"""In a list of streams: whatever else there is, which every rank holds whole."""
OPTIONAL = "?"
"""At the end of a name: the module or parameter is one that not every model of a class has."""


@dataclass(frozen=True)
class SequenceParallelInput:
    """Split one tensor over the ranks, where a module takes or returns it.

    A stream with fewer tokens (or units) than there are ranks stays whole on every rank; its
    tokens count once all the same.
    """

    split_dim: int
    """Dimension of the sequence."""
    expected_dims: int | None = None
    """Number of dimensions that the tensor must have; ``None``: any."""
    split_output: bool = False
    """The tensor is an output of the module, not an input."""
    auto_pad: bool = False
    """Pad the shards to one length. Attention leaves the padding out and the gather cuts it off,
    so results are the same; for code that wants equal shards."""
    attends: bool = False
    """Its tokens attend: they are a stream, known by the name of the parameter (of an output: by
    module and index, ``"module.0"``). Position ids and the like do not attend."""
    like: str | None = None
    """Name of the stream whose tokens these entries belong to: they are split as it is. A length
    of 1 that is broadcast over the stream stays as it is."""
    unit: str | None = None
    """Name of an integer parameter of the module: so many neighbouring tokens stay together, as
    those of an image row for a model that convolves. Of a tensor the last dimension counts."""
    if_dims: int | None = None
    """Split the tensor only if it has this many dimensions, and let another pass as it is: for
    what may be given for each token or once for a sample."""


@dataclass(frozen=True)
class SequenceParallelPartialInput:
    """Split the image part of a tensor that holds text and, after it, image."""

    split_dim: int
    """Dimension of the sequence."""
    text_len_source: str | int
    """Length of the text, which stays whole on every rank: a number, or the name of a parameter
    that is a number or a tensor (its first dimension counts)."""
    expected_dims: int | None = None
    """Number of dimensions that the tensor must have; ``None``: any."""
    split_output: bool = False
    """The tensor is an output of the module, not an input."""


@dataclass(frozen=True)
class SequenceParallelConcatInput:
    """Split a tensor that holds several streams one after the other, each as it is split."""

    split_dim: int
    """Dimension of the sequence."""
    streams: tuple[str, ...]
    """Names of the streams in order; ``"*"`` at one place: what is left, which stays whole."""
    expected_dims: int | None = None
    """Number of dimensions that the tensor must have; ``None``: any."""
    split_output: bool = False
    """The tensor is an output of the module, not an input."""


@dataclass(frozen=True)
class SequenceParallelCount:
    """An integer parameter that counts the first tokens of a stream: each rank gets its own part.

    For example the tokens of a video's first frame, which a model treats in another way.
    """

    like: str
    """Name of the stream."""
    unit: str | None = None
    """Name of an integer parameter: the count is of units of so many tokens, as image rows."""


@dataclass(frozen=True)
class SequenceParallelRefusal:
    """A parameter that the model cannot be given while its sequence is split: it is an error."""

    reason: str
    """Why, and what to do instead."""


@dataclass(frozen=True)
class SequenceParallelOutput:
    """Gather one output of a module from the ranks."""

    gather_dim: int
    """Dimension of the sequence."""
    expected_dims: int | None = None
    """Number of dimensions that the tensor must have; ``None``: any."""
    like: str | None = None
    """Name of the stream whose tokens these are; ``None`` where only one attends."""


@dataclass(frozen=True)
class SequenceParallelAttention:
    """How the attention calls of a module attend while its sequence is split.

    Modules that no entry names attend over all streams in the order of the plan, or locally where
    they have ``is_cross_attention`` set.
    """

    streams: tuple[str, ...] = ()
    """Streams of the queries, in the order in which the model concatenates them; none: all. A
    ``"*"`` stands for further tokens, which every rank holds whole."""
    kv_streams: tuple[str, ...] | None = None
    """Streams of the keys and values; ``None``: those of the queries."""
    masks: Mapping[str, str] = field(default_factory=dict)
    """For a stream the name of the split input that is its key mask, ``(batch, tokens)``. The
    mask is then made from the whole of these, which costs nothing, and the one that the model
    made of this rank's part is not read."""
    kind: Literal["softmax", "linear", "local"] = "softmax"
    """``"local"``: queries of this rank to keys that every rank holds whole, as those of a text
    that is not split. ``"linear"``: the first product of matrices sums over the tokens (linear
    attention, arXiv 2410.10629): it is summed over the ranks."""


@dataclass(frozen=True)
class SequenceParallelConvolution:
    """A convolution over image rows, ``(batch, channels, rows, columns)``, that the ranks hold.

    The rows beyond this rank's own come from its neighbours.
    """

    like: str
    """Name of the stream, which is split in units of rows."""


LOCAL_ATTENTION = SequenceParallelAttention(kind="local")
"""For attention to keys that every rank holds whole."""

AnySequenceParallelInput = (
    SequenceParallelInput
    | SequenceParallelPartialInput
    | SequenceParallelConcatInput
    | SequenceParallelCount
    | SequenceParallelRefusal
)
"""What may be said of one parameter or output."""
_Planned = AnySequenceParallelInput | tuple[AnySequenceParallelInput | None, ...]
InputPlan = Mapping[Any, _Planned]  # str or int; a mapping is invariant in its keys
"""By parameter name, or by index of the output (with ``split_output``). For a parameter that is a
tuple or list: a tuple, one entry for each item (``None`` leaves an item as it is), or one entry for
all items, of which there may be any number, as for a dict. A ``?`` after the name: if ``forward``
takes it."""
OutputPlan = SequenceParallelOutput | tuple[SequenceParallelOutput | None, ...]
"""For an output that is a tensor, or for each of several outputs."""
ModulePlan = InputPlan | OutputPlan | SequenceParallelAttention | SequenceParallelConvolution
SequenceParallelModelPlan = Mapping[str, ModulePlan]
"""By name of the module: ``""`` for the model itself, dotted names for those inside it. ``*`` in
place of an index stands for every module of a list or dict, ``-1`` for the last one, and a ``?``
after a part for a module that may be missing. Several names may mean one module: their entries add
up."""
