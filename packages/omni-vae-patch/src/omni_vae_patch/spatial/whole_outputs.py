"""The outputs of an autoencoder's methods, around the tensor that is sharded."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from omni_group_coordinator import ParallelError


def sharded_tensor(output: Any) -> Tensor:
    """The feature map in the output of ``decode`` or ``encode``.

    A decoded sample, a latent, or the parameters of the distribution of one.

    Raises:
        ParallelError: There is none.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple) and output:
        return sharded_tensor(output[0])
    for name in ("sample", "latent", "latents", "latent_dist", "parameters"):
        # A distribution has a method of that name.
        found = getattr(output, name, None)
        if found is not None and not callable(found):
            return sharded_tensor(found)
    msg = f"the autoencoder returned a {type(output).__name__}, in which no feature map was found"
    raise ParallelError(msg)


def with_tensor(output: Any, tensor: Tensor) -> Any:
    """The same output around another feature map."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple):
        return (with_tensor(output[0], tensor), *output[1:])
    if hasattr(output, "parameters") and hasattr(output, "mode"):
        # A diagonal Gaussian is made of its parameters; one of another kind takes them as well.
        return type(output)(tensor)
    for name in ("sample", "latent", "latents", "latent_dist"):
        found = getattr(output, name, None)
        if found is not None and not callable(found):
            return type(output)(**{name: with_tensor(found, tensor)})
    msg = f"cannot put a whole feature map into a {type(output).__name__}"
    raise ParallelError(msg)
