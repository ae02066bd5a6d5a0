"""The state of this process: made, asked, and destroyed, under the names that diffusion code knows.

The getters are in `getters`, torch's default group in `environment`; both are re-exported.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from omni_group_coordinator import (
    GroupCoordinator,
    ParallelConfigError,
    ParallelError,
    PipelineGroupCoordinator,
    SequenceParallelGroupCoordinator,
)
from omni_group_coordinator.utils import check_timeout
from omni_parallel_state._agreement import agree_over_world
from omni_parallel_state._legal_values import check_degree, divisors, nearest
from omni_parallel_state.current import default_state, get_parallel_state, set_default_state
from omni_parallel_state.environment import (
    destroy_distributed_environment,
    find_environment,
    get_world_group,
    init_distributed_environment,
    init_world_group,
)
from omni_parallel_state.getters import (
    get_cfg_group,
    get_classifier_free_guidance_rank,
    get_classifier_free_guidance_world_size,
    get_data_parallel_rank,
    get_data_parallel_world_size,
    get_dit_group,
    get_dit_rank,
    get_dit_world_size,
    get_dp_group,
    get_fs_group,
    get_fully_shard_rank,
    get_fully_shard_world_size,
    get_pipeline_parallel_rank,
    get_pipeline_parallel_world_size,
    get_pp_group,
    get_replicate_group,
    get_ring_group,
    get_ring_parallel_rank,
    get_ring_parallel_world_size,
    get_sequence_parallel_rank,
    get_sequence_parallel_world_size,
    get_sp_group,
    get_tensor_parallel_rank,
    get_tensor_parallel_world_size,
    get_tp_group,
    get_ulysses_group,
    get_ulysses_parallel_rank,
    get_ulysses_parallel_world_size,
    get_vae_group,
    get_vae_rank,
    get_vae_world_size,
    init_dit_group,
    is_dp_last_group,
    is_pipeline_first_stage,
    is_pipeline_last_stage,
)
from omni_parallel_state.layout import Degrees, ParallelLayout
from omni_parallel_state.rank_generator import (
    DEFAULT_ORDER,
    RankGenerator,
    generate_masked_orthogonal_rank_groups,
)
from omni_parallel_state.sequence_groups import set_seq_parallel_pg
from omni_parallel_state.state import ParallelState, default_backend, default_device

__all__ = [
    "ParallelLayout",
    "ParallelState",
    "RankGenerator",
    "destroy_distributed_env",
    "destroy_distributed_environment",
    "destroy_model_parallel",
    "generate_masked_orthogonal_rank_groups",
    "get_cfg_group",
    "get_classifier_free_guidance_rank",
    "get_classifier_free_guidance_world_size",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_dit_group",
    "get_dit_rank",
    "get_dit_world_size",
    "get_dp_group",
    "get_fs_group",
    "get_fully_shard_rank",
    "get_fully_shard_world_size",
    "get_parallel_state",
    "get_pipeline_parallel_rank",
    "get_pipeline_parallel_world_size",
    "get_pp_group",
    "get_replicate_group",
    "get_ring_group",
    "get_ring_parallel_rank",
    "get_ring_parallel_world_size",
    "get_sequence_parallel_rank",
    "get_sequence_parallel_world_size",
    "get_sp_group",
    "get_tensor_parallel_rank",
    "get_tensor_parallel_world_size",
    "get_tp_group",
    "get_ulysses_group",
    "get_ulysses_parallel_rank",
    "get_ulysses_parallel_world_size",
    "get_vae_group",
    "get_vae_rank",
    "get_vae_world_size",
    "get_world_group",
    "init_distributed_environment",
    "init_dit_group",
    "init_model_parallel_group",
    "init_world_group",
    "initialize_model_parallel",
    "is_dp_last_group",
    "is_pipeline_first_stage",
    "is_pipeline_last_stage",
    "model_parallel_is_initialized",
    "set_seq_parallel_pg",
]

_COORDINATORS: dict[str, type[GroupCoordinator]] = {
    "data": GroupCoordinator,
    "classifier_free_guidance": GroupCoordinator,
    "pipeline": PipelineGroupCoordinator,
    "sequence": SequenceParallelGroupCoordinator,
    "tensor": GroupCoordinator,
    "fully_shard": GroupCoordinator,
    "vae": GroupCoordinator,
    "dit": GroupCoordinator,
}


_ARGUMENTS = {
    "dp": "data_parallel_size",
    "cfg": "cfg_parallel_size",
    "pp": "pipeline_parallel_size",
    "ring": "ring_degree",
    "ulysses": "ulysses_degree",
    "tp": "tensor_parallel_size",
    "fs": "fully_shard_degree",
    "replicate": "hsdp_replicate_size",
    "vae": "vae_parallel_size",
}
"""What `initialize_model_parallel` calls the dimensions."""


def initialize_model_parallel(  # noqa: PLR0913, PLR0917  a signature that diffusion code calls
    data_parallel_size: int | None = 1,
    cfg_parallel_size: int = 1,
    sequence_parallel_size: int | None = None,
    ulysses_degree: int = 1,
    ring_degree: int = 1,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    fully_shard_degree: int = 1,
    hsdp_replicate_size: int = 1,
    backend: str | None = None,
    *,
    vae_parallel_size: int = 1,
    order: str = DEFAULT_ORDER,
    timeout: timedelta | None = None,
    device: torch.device | str | None = None,
    debug: bool | None = None,
) -> ParallelState:
    """Make the parallel state of this process; the getters read it in every thread.

    Args:
        data_parallel_size: Replicas; None takes the ranks that the other degrees leave.
        cfg_parallel_size: Ranks that share the guidance branches.
        sequence_parallel_size: None, or ulysses_degree * ring_degree as a check.
        ulysses_degree: Inner sequence parallelism.
        ring_degree: Outer sequence parallelism.
        tensor_parallel_size: Ranks that share each layer's weights.
        pipeline_parallel_size: Stages.
        fully_shard_degree: Ranks that share one copy of the weights. Does not multiply the world,
            unless every degree above is 1.
        hsdp_replicate_size: Sharded copies of the weights in one HSDP mesh; likewise.
        backend: torch backend of the groups; default: that of the default group.
        vae_parallel_size: Ranks that share an image in the VAE; likewise.
        order: Dimensions from fastest to slowest.
        timeout: How long a collective may wait; default: that of the environment, else 10 minutes.
        device: Device of this rank; default: that of the environment.
        debug: Compare each call over the ranks before it runs; default: the environment decides.

    Raises:
        ParallelConfigError: Degrees that don't fit the world; names the nearest that do.
        ParallelError: There is a state already, or no default group for several ranks.
    """
    if default_state() is not None:
        msg = (
            "the parallel state of this process exists already; call destroy_model_parallel() "
            "first, or make a second one with ParallelState(layout) and `with state.use():`"
        )
        raise ParallelError(msg)
    degrees = Degrees(
        cfg=cfg_parallel_size,
        pp=pipeline_parallel_size,
        ring=ring_degree,
        ulysses=ulysses_degree,
        tp=tensor_parallel_size,
        fs=fully_shard_degree,
        replicate=hsdp_replicate_size,
        vae=vae_parallel_size,
        order=order,
    )
    environment = find_environment()
    if environment is not None:
        device = environment.device if device is None else device
        backend = backend or environment.backend
        timeout = timeout or environment.timeout
    try:
        layout = _layout(data_parallel_size, sequence_parallel_size, degrees)
    except ParallelConfigError as error:
        where = default_device(default_backend(device)) if device is None else torch.device(device)
        # The other ranks may have other arguments, and would wait for this one.
        agree_over_world(f"refused: {error}", where, check_timeout(timeout))
        raise
    state = ParallelState(layout, device, timeout, backend=backend, debug=debug)
    set_default_state(state)
    return state


def model_parallel_is_initialized() -> bool:
    """Whether `initialize_model_parallel` has made a state that has not been destroyed."""
    return default_state() is not None


def destroy_model_parallel() -> None:
    """Destroy the state of `initialize_model_parallel`; a second call does nothing."""
    state = default_state()
    set_default_state(None)
    if state is not None:
        state.destroy()


def destroy_distributed_env() -> None:
    """The same as `destroy_distributed_environment`, under the name that older code calls."""
    destroy_distributed_environment()


def init_model_parallel_group(
    group_ranks: list[list[int]],
    local_rank: int,
    backend: str,
    parallel_mode: str,
    **kwargs: Any,
) -> GroupCoordinator:
    """A coordinator of the class for a mode, with groups that its `destroy` destroys.

    Args:
        group_ranks: One list of global ranks per group; this rank is in one of them.
        local_rank: Rank on this host.
        backend: torch backend of the groups.
        parallel_mode: data, classifier_free_guidance, pipeline, sequence, tensor, fully_shard,
            vae or dit.
        kwargs: Other arguments of the coordinator; for sequence: ulysses_group and ring_group.

    Raises:
        ParallelConfigError: An unknown mode.
    """
    if parallel_mode not in _COORDINATORS:
        legal = ", ".join(_COORDINATORS)
        msg = f"parallel_mode={parallel_mode!r} is unknown; legal: {legal}"
        raise ParallelConfigError(msg)
    kwargs.setdefault("name", parallel_mode)
    return _COORDINATORS[parallel_mode](group_ranks, local_rank, backend, **kwargs)


def _layout(dp: int | None, sequence: int | None, degrees: Degrees) -> ParallelLayout:
    """The layout of the whole world; errors name the arguments of `initialize_model_parallel`."""
    try:
        _check_sequence_size(sequence, degrees["ulysses"], degrees["ring"])
        if dist.is_initialized():
            return ParallelLayout.for_world(dist.get_world_size(), dp=dp, **degrees)
        return ParallelLayout(dp=1 if dp is None else dp, **degrees)
    except ParallelConfigError as error:
        raise ParallelConfigError(_in_words_of_the_caller(str(error))) from None


def _in_words_of_the_caller(message: str) -> str:
    message = re.sub(r"\bdp: (\d+)", r"data_parallel_size=\1 (or None to infer)", message)
    names = "|".join(_ARGUMENTS)
    return re.sub(rf"\b({names})(?=[=:]| with)", lambda found: _ARGUMENTS[found[1]], message)


def _check_sequence_size(size: int | None, ulysses: int, ring: int) -> None:
    """Refuse a sequence-parallel size that is not the product of its two parts."""
    product = check_degree("ulysses_degree", ulysses) * check_degree("ring_degree", ring)
    if size is None or check_degree("sequence_parallel_size", size) == product:
        return
    ways = ", ".join(f"{u} * {size // u}" for u in nearest(divisors(size), ulysses))
    msg = (
        f"sequence_parallel_size={size}, but ulysses_degree={ulysses} * ring_degree={ring} = "
        f"{product}; leave it out, or choose ulysses_degree * ring_degree as {ways}"
    )
    raise ParallelConfigError(msg)
