"""What diffusers' context parallelism lacks to run without an accelerator.

For these benchmarks alone. With CUDA neither is needed; the code of diffusers that is timed, its
hooks and its attention templates, is the stock one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@contextmanager
def without_accelerator() -> Iterator[None]:
    """Let diffusers' context parallelism run on the CPU or the meta device within the block."""
    from diffusers.models import attention_dispatch, modeling_utils

    stock = attention_dispatch._native_attention_forward_op

    def forward_op(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
    ) -> Any:
        attn_mask, _, is_causal, scale, _, return_lse = rest
        if return_lse:
            return _attention_with_lse(query, key, value, attn_mask, is_causal, scale)
        return stock(ctx, query, key, value, *rest, **options)

    with (
        mock.patch.object(
            modeling_utils.ModelMixin, "_resolve_parallel_config", _resolve_parallel_config
        ),
        mock.patch.object(attention_dispatch, "_native_attention_forward_op", forward_op),
    ):
        yield


def _attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Shim 1: diffusers' "native" backend returns no log-sum-exp, which its ring needs.

    The kernel is the one that `scaled_dot_product_attention` takes on the CPU.
    """
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )
    return out.transpose(1, 2), lse.transpose(1, 2)


def _resolve_parallel_config(self: Any, config: Any) -> Any:
    """Shim 2: the stock method divides by the number of accelerators, which is zero here.

    As the stock one from there on, for context parallelism with a mesh of the CPU.
    """
    from diffusers.models._modeling_parallel import ParallelConfig
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    parallel = ParallelConfig(context_parallel_config=config)
    mesh = config.mesh or init_device_mesh(
        "cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names
    )
    parallel.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), mesh=mesh)
    self._parallel_config = parallel
    return parallel
