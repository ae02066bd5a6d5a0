"""Questions to the current parallel state, under the names that diffusion code knows.

Every getter raises `ParallelError`, a RuntimeError, if there is no parallel state.
"""

from __future__ import annotations

from omni_group_coordinator import (
    GroupCoordinator,
    PipelineGroupCoordinator,
    SequenceParallelGroupCoordinator,
)
from omni_parallel_state.current import get_parallel_state


def get_sp_group() -> SequenceParallelGroupCoordinator:
    """Ranks that share this rank's sequence."""
    return get_parallel_state().sp


def get_sequence_parallel_world_size() -> int:
    """Shards of a sequence."""
    return get_sp_group().world_size


def get_sequence_parallel_rank() -> int:
    """Which shard of the sequence this rank holds."""
    return get_sp_group().rank_in_group


def get_ulysses_group() -> GroupCoordinator:
    """Ranks that exchange heads with this rank: neighbours in the sequence."""
    return get_parallel_state().ulysses


def get_ulysses_parallel_world_size() -> int:
    """Ranks of the Ulysses group."""
    return get_ulysses_group().world_size


def get_ulysses_parallel_rank() -> int:
    """This rank's index in its Ulysses group."""
    return get_ulysses_group().rank_in_group


def get_ring_group() -> GroupCoordinator:
    """Ranks that pass keys and values round with this rank."""
    return get_parallel_state().ring


def get_ring_parallel_world_size() -> int:
    """Ranks of the Ring group."""
    return get_ring_group().world_size


def get_ring_parallel_rank() -> int:
    """This rank's index in its Ring group."""
    return get_ring_group().rank_in_group


def get_pp_group() -> PipelineGroupCoordinator:
    """The stages of this rank's pipeline."""
    return get_parallel_state().pp


def get_pipeline_parallel_world_size() -> int:
    """Number of stages."""
    return get_pp_group().world_size


def get_pipeline_parallel_rank() -> int:
    """Which stage this rank runs."""
    return get_pp_group().rank_in_group


def is_pipeline_first_stage() -> bool:
    """Whether this rank runs the first stage."""
    return get_pp_group().is_first_rank


def is_pipeline_last_stage() -> bool:
    """Whether this rank runs the last stage."""
    return get_pp_group().is_last_rank


def get_cfg_group() -> GroupCoordinator:
    """Ranks that share the guidance branches of this rank's sample."""
    return get_parallel_state().cfg


def get_classifier_free_guidance_world_size() -> int:
    """Ranks that share the guidance branches."""
    return get_cfg_group().world_size


def get_classifier_free_guidance_rank() -> int:
    """This rank's index among those that share the guidance branches."""
    return get_cfg_group().rank_in_group


def get_dp_group() -> GroupCoordinator:
    """Ranks in the same place of the other replicas."""
    return get_parallel_state().dp


def get_data_parallel_world_size() -> int:
    """Number of replicas."""
    return get_dp_group().world_size


def get_data_parallel_rank() -> int:
    """Which replica this rank belongs to."""
    return get_dp_group().rank_in_group


def is_dp_last_group() -> bool:
    """Whether this rank ends its replica: last stage, last guidance branch, last shard."""
    state = get_parallel_state()
    return all(group.is_last_rank for group in (state.sp, state.cfg, state.pp))


def get_tp_group() -> GroupCoordinator:
    """Ranks that share each layer's weights with this rank."""
    return get_parallel_state().tp


def get_tensor_parallel_world_size() -> int:
    """Ranks that share each layer's weights."""
    return get_tp_group().world_size


def get_tensor_parallel_rank() -> int:
    """Which part of each layer's weights this rank holds."""
    return get_tp_group().rank_in_group


def get_fs_group() -> GroupCoordinator:
    """Ranks over which one copy of the weights is fully sharded."""
    return get_parallel_state().fs


def get_fully_shard_world_size() -> int:
    """Shards of one copy of the weights."""
    return get_fs_group().world_size


def get_fully_shard_rank() -> int:
    """Which shard of the weights this rank holds."""
    return get_fs_group().rank_in_group


def get_replicate_group() -> GroupCoordinator:
    """Ranks that hold the same shard of the weights as this rank."""
    return get_parallel_state().replicate


def get_dit_group() -> GroupCoordinator:
    """Ranks that run the transformer."""
    return get_parallel_state().dit


def get_dit_world_size() -> int:
    """Number of ranks that run the transformer."""
    return get_dit_group().world_size


def get_dit_rank() -> int:
    """This rank's index among those that run the transformer."""
    return get_dit_group().rank_in_group


def init_dit_group(dit_parallel_size: int, backend: str | None = None) -> None:
    """Let only the first ranks of the world run the transformer. Call it on every rank.

    Raises:
        ParallelConfigError: The size is below 1 or above the world size.
    """
    get_parallel_state().set_dit_size(dit_parallel_size, backend)


def get_vae_group() -> GroupCoordinator:
    """Ranks that share an image in the VAE with this rank."""
    return get_parallel_state().vae


def get_vae_world_size() -> int:
    """Ranks that share an image in the VAE."""
    return get_vae_group().world_size


def get_vae_rank() -> int:
    """This rank's index among those that share an image in the VAE."""
    return get_vae_group().rank_in_group
