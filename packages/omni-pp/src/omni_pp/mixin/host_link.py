"""Streams of trees of tensors whose status the host knows without asking a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from omni_parallel_state.denoising.signature import signature
from omni_parallel_state.denoising.waiting import is_deferred, like_of, resolve
from omni_pp.stages.stage_link import StageLink


class HostLink(StageLink):
    """A `StageLink` whose statuses travel on the host.

    They tell of errors of Python, which the sender's host knows when it sends. So the receiver
    learns of one at once, on every device, and never computes on what is not there.
    """

    def status(self, value: int) -> Tensor:
        """What travels with each tree: zero, or not where a stage has failed."""
        return torch.full((1,), value, dtype=torch.uint8)


def stream_name(kwargs: Mapping[str, Any]) -> str:
    """A name for what depends on arguments of these shapes; the same on every rank.

    What has not arrived does not have to.
    """
    return repr(signature((), {key: _like(value) for key, value in kwargs.items()}))


def _like(value: Any) -> Any:
    if is_deferred(value):
        like = like_of(value)
        return resolve(value) if like is None else like
    if type(value) in (tuple, list):
        return type(value)(map(_like, value))
    if type(value) is dict:
        return {key: _like(item) for key, item in value.items()}
    return value
