"""Something else in the place of an autoencoder's network, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from omni_vae_patch.attributes import put

Answer = Callable[[tuple[Any, ...], dict[str, Any]], Any]
"""Of the arguments and keyword arguments of a call."""


class NetworkStandIn:
    """In the network's place: calls are answered, everything else is the network's own."""

    def __init__(self, network: nn.Module, answer: Answer) -> None:
        object.__setattr__(self, "_network", network)
        object.__setattr__(self, "_answer", answer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The answer."""
        return self._answer(args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As a call."""
        return self._answer(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def __getitem__(self, key: Any) -> Any:
        return self._network[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._network)

    def __len__(self) -> int:
        return len(self._network)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._network, name, value)

    @property
    def __class__(self) -> Any:
        """That of the network, for code that asks."""
        return type(self._network)

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise AttributeError(value)


@contextmanager
def intercepted(vae: Any, name: str, answer: Answer) -> Iterator[None]:
    """Answer the calls of an attribute for a while.

    The stand-in goes into the instance's dict, which Python looks into before it asks a module
    for its submodules: the module tree, its hooks and what torch.compile made of it stay as they
    are.
    """
    undo = put(vae, name, NetworkStandIn(getattr(vae, name), answer))
    try:
        yield
    finally:
        undo()
