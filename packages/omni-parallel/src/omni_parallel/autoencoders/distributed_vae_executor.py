"""The names of `omni_vae_patch.autoencoders.distributed_vae_executor`."""

from omni_parallel._forwarding import forward

__getattr__, __dir__ = forward(
    "omni_vae_patch.autoencoders.distributed_vae_executor", "omni-vae-patch"
)
