"""The names of `omni_vae_patch.autoencoders`."""

from omni_parallel._forwarding import forward

__getattr__, __dir__ = forward("omni_vae_patch.autoencoders", "omni-vae-patch")
