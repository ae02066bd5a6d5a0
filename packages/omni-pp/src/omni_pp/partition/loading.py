"""Reading one stage's part of a model, so that no rank ever holds all of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from omni_parallel_state import ParallelState, get_parallel_state
from omni_parallel_state.checkpoints.files import Entry, checkpoint_entries
from omni_parallel_state.checkpoints.filling import fill
from omni_parallel_state.checkpoints.matching import matched
from omni_parallel_state.checkpoints.skeleton import build_skeleton
from omni_parallel_state.checkpoints.together import together
from omni_pp.partition.partition import partition_model
from omni_pp.pp_config import PipelineParallelConfig
from omni_pp.stages.agreement import agree_on

ModelT = TypeVar("ModelT", bound=nn.Module)
_ADVICE = (
    "keys are read as they are; if from_pretrained() renames them for this class, load with it "
    "and call apply_pipeline_parallel()"
)


def load_stage(
    cls: Callable[..., ModelT],
    path: str | Path,
    config: PipelineParallelConfig | None = None,
    *,
    subfolder: str = "",
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    torch_dtype: torch.dtype | None = None,
    state: ParallelState | None = None,
) -> ModelT:
    """Load a model from safetensors files: each rank reads its stage's part and no more.

    The model is that of ``cls.from_pretrained`` cut by `partition_model`, on the device of the
    rank. Give it to a pipeline: `apply_pipeline_parallel` finds that it is cut, and leaves it so
    when it is removed. Where to cut is found from the shapes alone, so costs that were measured
    have to be given as ``balance``. Every stage makes the same call; an error on one of them is
    raised on all.

    Args:
        cls: A model class of diffusers or transformers, or whatever makes a module when it is
            called without arguments.
        path: Folder on this machine, as ``save_pretrained`` writes it: one file, or an index
            and the files that it names.
        config: How the model is cut; default: at equal cost.
        subfolder: Of `path`, such as ``"transformer"``.
        variant: Of the files, such as ``"fp16"``.
        dtype: Of the weights, but for what the class keeps in float32. Default: as for
            ``from_pretrained``.
        torch_dtype: Another name of `dtype`.
        state: The ranks: its ``pp`` group; default: the current state.

    Returns:
        The model, of which this rank has its part, in evaluation mode; whole on one rank.

    Raises:
        RankMismatchError: The stages were given different configurations.
        ParallelConfigError: The model cannot be cut so; files that are missing or damaged; keys
            that the checkpoint lacks or has in excess, or tensors of other shapes, all of them
            listed; or a package that is not installed.
        ParallelError: Another stage could not load.
        RuntimeError: No state was given and none is current.
    """
    state = get_parallel_state() if state is None else state
    config = PipelineParallelConfig() if config is None else config
    folder = Path(path) / subfolder
    group = state.pp if state.pp.world_size > 1 else None

    def prepare() -> tuple[ModelT, dict[str, Entry]]:
        entries = checkpoint_entries(folder, variant)  # first, for its words on a wrong path
        model = build_skeleton(cls, folder, dtype or torch_dtype)
        return model, matched(model, entries, _ADVICE)  # type: ignore[return-value]

    def load() -> None:
        tensors = model.state_dict(keep_vars=True)
        released: list[nn.Module] = []
        if group is not None:
            part = partition_model(
                model,
                group.world_size,
                stage=group.rank_in_group,
                virtual_stages=config.virtual_stages,
                points=config.points or None,
                balance=config.balance,
                block_lists=config.block_lists,
            )
            released = [block for _, block in part.released()]
        fill(model, tensors, entries, state.device, released)

    if group is not None:
        agree_on(group, (config, variant, dtype or torch_dtype))
    with torch.inference_mode(False), torch.no_grad():
        model, entries = together(group, "prepare to load", prepare)
        together(group, "load", load)
    return model
