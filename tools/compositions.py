"""Layouts of several strategies that are tested for parity, by number of ranks."""

from __future__ import annotations

LAYOUTS: dict[int, tuple[str, ...]] = {
    2: (
        "cfg=2,vae_patch=2",
        "ulysses=2,vae_patch=2",
        "ring=2,hsdp=2,vae_patch=2",
        "cfg=2,hsdp=2",
        "pp=2,vae_patch=2",
    ),
    4: (
        "cfg=2,ulysses=2,vae_patch=4",
        "ulysses=2,ring=2,hsdp=4,vae_patch=2",
        "cfg=2,ulysses=2,hsdp=2,vae_patch=4",
        "cfg=2,pp=2,vae_patch=4",
        "pp=2,ulysses=2,hsdp=2",
        "pp=2,ring=2,vae_patch=4",
        "hsdp=2,hsdp_replicate=2,vae_patch=4",
        "dp=2,ulysses=2,hsdp=4",
    ),
    8: (
        "cfg=2,ulysses=2,ring=2,hsdp=4,vae_patch=8",
        "cfg=2,pp=2,ulysses=2,vae_patch=8",
        "dp=2,cfg=2,ulysses=2,hsdp=4,hsdp_replicate=2,vae_patch=2",
    ),
}
"""Every pair of strategies that may be together is in one of them, which a test checks."""

FUSED: dict[int, tuple[str, ...]] = {
    2: ("pipefusion=2,vae_patch=2",),
    4: ("pipefusion=2,cfg=2,vae_patch=4", "pipefusion=2,ulysses=2,hsdp=2,vae_patch=2"),
    8: ("cfg=2,pipefusion=2,ring=2,vae_patch=8",),
}
"""Of what approximates, so that a test of its own runs them, with all steps exact ones."""

PIPELINES = ("Stable Diffusion 3", "Wan", "Flux", "Qwen-Image")
"""Of `tests/stock_pipelines`: the first runs every layout, with an autoencoder, the others some."""
