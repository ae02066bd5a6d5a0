"""The names of `omni_vae_patch.vae_patch_parallel`."""

from omni_parallel._forwarding import forward

__getattr__, __dir__ = forward("omni_vae_patch.vae_patch_parallel", "omni-vae-patch")
