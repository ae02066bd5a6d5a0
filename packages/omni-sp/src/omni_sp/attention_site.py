"""The attention calls of one module of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_parallel_state.rebinding import is_dispatch
from omni_sp.application import Application
from omni_sp.attention.operator import AttentionCall, attend, register
from omni_sp.attention.parallel import ParallelAttention
from omni_sp.dispatched_kernel import DispatchedKernel, backend_name
from omni_sp.plan_entries import SequenceParallelAttention
from omni_sp.region import ShardedRegion
from omni_sp.shards import Segment
from omni_sp.sp_config import SequenceParallelConfig


class AttentionSite:
    """What a module calls in place of torch's attention, or of diffusers' dispatcher to kernels.

    While the streams of the module are split, the calls run over the whole sequence; else they
    are the original ones.

    Args:
        name: Name of the module in the model.
        plan: What its attention attends over.
        application: Knows the region of the call that is under way.
        config: How the work is divided.
    """

    def __init__(
        self,
        name: str,
        plan: SequenceParallelAttention,
        application: Application,
        config: SequenceParallelConfig,
    ) -> None:
        self._where = f"attention of module {name!r}"
        self._plan = plan
        self._application = application
        self._config = config
        self._attention = ParallelAttention(application.group, config)
        self._key = register(self._attention)
        self._by_backend: dict[str, tuple[str, ParallelAttention]] = {}
        self._dispatch: Callable[..., Tensor] | None = None

    def replacement(self, value: Any) -> Any:
        """What the module calls in place of a function."""
        if self._plan.kind == "linear":
            return self.matmul if value is torch.matmul else value
        if value is scaled_dot_product_attention:
            return self.scaled_dot_product_attention
        if is_dispatch(value):
            self._dispatch = value
            return self.dispatch
        return value

    def prepare(self, backend: Any) -> None:
        """Make ready for a backend of diffusers, which cannot be done within a trace."""
        if self._dispatch is not None:
            self._key_for(backend, None)

    # -- softmax attention -----------------------------------------------------------------

    def scaled_dot_product_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As torch's function: ``(batch, heads, sequence, head_dim)``."""
        region = self._open_region()
        if region is not None:
            if query.ndim != 4:
                msg = (
                    f"{self._where} has a query of shape {tuple(query.shape)}; expected (batch, "
                    "heads, sequence, head_dim)"
                )
                raise ParallelError(msg)
            tensors = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
            out = self._attend(region, tensors, attn_mask, dropout_p, is_causal, scale, self._key)
            if out is not None:
                return out.transpose(1, 2)
        return self._known(
            scaled_dot_product_attention,
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )

    def dispatch(  # noqa: PLR0913, PLR0917  diffusers' signature
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Tensor:
        """As diffusers' function: ``(batch, sequence, heads, head_dim)``."""
        region = self._open_region()
        if region is not None:
            if parallel_config is not None:
                msg = (
                    f"{self._where} has diffusers' own context parallelism switched on "
                    "(enable_parallelism); use one of the two"
                )
                raise ParallelConfigError(msg)
            per_sample = attn_mask is not None and attn_mask.shape[0] == query.shape[0]
            if attn_mask is not None and attn_mask.ndim == 2 and per_sample:
                attn_mask = attn_mask[:, None, None, :]  # key padding, by diffusers' convention
            key_of = self._key_for(backend, attention_kwargs)
            out = self._attend(
                region, (query, key, value), attn_mask, dropout_p, is_causal, scale, key_of
            )
            if out is not None:
                return out
        if self._dispatch is None:
            msg = f"{self._where}: dispatch was called without an original"
            raise ParallelError(msg)
        return self._known(
            self._dispatch,
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            attention_kwargs=attention_kwargs,
            backend=backend,
            parallel_config=parallel_config,
        )

    def _open_region(self) -> ShardedRegion | None:
        region = self._application.region
        return region if region is not None and region.is_open(self._plan, self._where) else None

    def _attend(
        self,
        region: ShardedRegion,
        tensors: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        dropout: float,
        is_causal: bool,
        scale: float | None,
        attention: str,
    ) -> Tensor | None:
        """Attention over the whole sequence; ``None`` where every rank holds all of it."""
        query, key, value = tensors
        segments, kv_segments = region.agreed(
            self._where, self._segments, region, query.shape[1], key.shape[1], dropout
        )
        region.attended = True
        if all(segment.replicated for segment in segments + kv_segments):
            return None
        if self._plan.masks:
            mask = region.mask(self._plan, query, self._where)
        call = AttentionCall(attention, segments, kv_segments, is_causal, scale)
        return self._known(attend, query, key, value, mask, call)

    def _segments(
        self, region: ShardedRegion, queries: int, keys: int, dropout: float
    ) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
        """How the queries and the keys of a call lie on the ranks."""
        if dropout:
            msg = f"{self._where} has dropout_p={dropout}; legal: 0 (call model.eval())"
            raise ParallelConfigError(msg)
        plan = self._plan
        segments = region.segments(plan.streams, queries, self._where)
        if plan.kv_streams is None and keys == queries:
            return segments, segments
        kv_streams = plan.streams if plan.kv_streams is None else plan.kv_streams
        return segments, region.segments(kv_streams, keys, self._where)

    def _known(self, attention: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
        """Make an attention call, known to be one that was taken over."""
        self._application.legal_calls += 1
        try:
            return attention(*args, **options)
        finally:
            self._application.legal_calls -= 1

    def _key_for(self, backend: Any, options: dict[str, Any] | None) -> str:
        """Which attention serves diffusers' backend: torch's kernel, or one that the user chose."""
        name = backend_name(self._dispatch, backend)
        if self._config.kernel is not None or (name == "native" and not options):
            return self._key
        if name not in self._by_backend or options:
            kernel = DispatchedKernel(self._dispatch, backend, name, options)
            attention = ParallelAttention(self._application.group, self._config, kernel)
            self._by_backend[name] = (register(attention), attention)
        return self._by_backend[name][0]

    # -- linear attention ------------------------------------------------------------------

    def matmul(self, left: Tensor, right: Tensor) -> Tensor:
        """As torch's function; the product that sums over the tokens is summed over the ranks."""
        product = torch.matmul(left, right)
        region = self._open_region()
        if region is None:
            return product
        if not region.agreed(self._where, self._sums_over_tokens, region, left, right):
            return product
        region.attended = True
        return region.group.all_reduce(product)

    def _sums_over_tokens(self, region: ShardedRegion, left: Tensor, right: Tensor) -> bool:
        """Whether this product sums over tokens that other ranks hold."""
        (segment,) = region.segments(self._plan.streams, self._tokens(region), self._where)
        # Keys and values come first, then the queries with their product.
        if not region.first_of_two(self._where) or segment.replicated:
            return False
        if left.shape[-1] != region.local_length(segment):
            msg = (
                f"{self._where}: expected its first product to sum over "
                f"{region.local_length(segment)} tokens; found shapes {tuple(left.shape)} and "
                f"{tuple(right.shape)}"
            )
            raise ParallelError(msg)
        return True

    def _tokens(self, region: ShardedRegion) -> int:
        names = region.names(self._plan.streams)
        return sum(region.local_length(region.stream(n, self._where).segment) for n in names)
