"""The kernel that a user chose for a diffusers model, by ``set_attention_backend`` or its like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from omni_group_coordinator import ParallelConfigError


def backend_name(dispatch: Callable[..., Tensor] | None, backend: Any) -> str:
    """Name of the kernel that a call of the dispatcher would use.

    Args:
        dispatch: The dispatcher.
        backend: Its argument; ``None``: what is active, by context manager or environment.
    """
    if backend is None:
        # Private to diffusers; checked on 0.42. Without it the native kernel is what diffusers has.
        registry = getattr(dispatch, "__globals__", {}).get("_AttentionBackendRegistry")
        backend = "native" if registry is None else registry.get_active_backend()[0]
    return str(getattr(backend, "value", backend))


class DispatchedKernel:
    """Whatever diffusers' dispatcher calls for a backend.

    Args:
        dispatch: The dispatcher.
        backend: Its argument.
        name: Name of the backend, for messages.
        options: Further arguments of the model's calls.
    """

    def __init__(
        self,
        dispatch: Callable[..., Tensor] | None,
        backend: Any,
        name: str,
        options: dict[str, Any] | None,
    ) -> None:
        self._dispatch = dispatch
        self._backend = backend
        self._name = name
        self._options = options

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> Tensor:
        """See `AttentionKernel`."""
        if self._dispatch is None:
            msg = f"the attention backend {self._name!r} has no dispatcher"
            raise ParallelConfigError(msg)
        return self._dispatch(
            query,
            key,
            value,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=query.shape[2] != key.shape[2],
            attention_kwargs=self._options,
            backend=self._backend,
        )

    def attend_with_lse(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        """Raises: the dispatcher gives no log-sum-exp that holds for every backend."""
        msg = (
            f"Ring attention needs the log-sum-exp of its kernel, which diffusers' backend "
            f"{self._name!r} does not give; legal: kv_exchange='allgather', Ulysses "
            "(ring_degree=1), kernel= with a kernel of your own, or the backend 'native'"
        )
        raise ParallelConfigError(msg)
