"""torch's modules that treat each position of space by itself, whatever else they mix."""

from __future__ import annotations

from typing import Any

from torch import nn

LOCAL: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.Conv1d,  # over time, of diffusers' autoencoders
    nn.Identity,
    # norms; those of batches in eval mode, with statistics of their own
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
    # dropout, in eval mode
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    # rearrangements of channels and of the positions that they become
    nn.ChannelShuffle,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    # activations
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.RReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softmax2d,  # over channels
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
    # containers
    nn.ModuleDict,
    nn.ModuleList,
    nn.ParameterDict,
    nn.ParameterList,
    nn.Sequential,
)

_ALONG_ONE = (nn.GLU, nn.Softmax, nn.Softmin, nn.LogSoftmax)
_OVER_LAST = (nn.LayerNorm, nn.RMSNorm)

# Batch, channels and, of videos, frames, however many dimensions follow.
_NOT_SPACE = (0, 1, -3, -4)


def why_not_local(module: nn.Module) -> str | None:
    """Why a module of torch may mix positions in space; ``None`` if it does not."""
    if isinstance(module, _ALONG_ONE):
        dim: Any = module.dim
        if dim in _NOT_SPACE:
            return None
        return f"works along dimension {dim}, which may be of space; legal: dim=1"
    if isinstance(module, _OVER_LAST):
        shape: Any = module.normalized_shape
        if len(shape) == 1:
            return None
        return f"norms over {tuple(shape)}, which may be of space; legal: the channels alone"
    if isinstance(module, LOCAL) or not _is_of_torch(module):
        return None
    return "of which it is not known how it mixes positions in space"


def _is_of_torch(module: nn.Module) -> bool:
    name = type(module).__module__
    # What parametrizes weights has nothing to do with feature maps.
    return name.startswith("torch.") and not name.startswith("torch.nn.utils.")
