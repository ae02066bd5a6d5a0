"""What accelerators can do at most, as their vendors state it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuType:
    """One kind of accelerator, in a host that is usual for it."""

    name: str
    tflops: float
    """Peak of dense products of matrices in bfloat16 or float16, in 10^12 operations a second."""
    memory_gb: float
    """Memory, in 10^9 bytes."""
    memory_gbps: float
    """What its memory carries, in 10^9 bytes a second."""
    link_gbps: float
    """What it sends to others in its host, one way, in 10^9 bytes a second."""
    node_link_gbps: float
    """What it sends to other hosts, one way, with the network of the host divided among all."""
    source: str
    """Where the vendor states it."""


# Vendors state NVLink, Infinity Fabric and PCIe as the sum of both ways, and NVIDIA most peaks with
# sparsity: both are halved here. Networks are those of the vendor's own hosts: 400 Gb/s for each
# H100, H200, B200 and MI300X, 200 Gb/s for each A100. L40S, RTX 4090: 100 Gb/s for each, a guess.
GPU_TYPES: tuple[GpuType, ...] = (
    GpuType("h100-sxm", 989, 80, 3350, 450, 50, "NVIDIA H100 datasheet; NVLink 4, 900 GB/s"),
    GpuType("h100-pcie", 756, 80, 2000, 64, 50, "NVIDIA H100 PCIe product brief; PCIe 5 x16"),
    GpuType("h200", 989, 141, 4800, 450, 50, "NVIDIA H200 datasheet; NVLink 4, 900 GB/s"),
    GpuType("b200", 2250, 180, 8000, 900, 50, "NVIDIA DGX B200 datasheet; NVLink 5, 1.8 TB/s"),
    GpuType("a100-40gb", 312, 40, 1555, 300, 25, "NVIDIA A100 datasheet; NVLink 3, 600 GB/s"),
    GpuType("a100-80gb", 312, 80, 2039, 300, 25, "NVIDIA A100 datasheet; NVLink 3, 600 GB/s"),
    GpuType("l40s", 362, 48, 864, 32, 12.5, "NVIDIA L40S datasheet; PCIe 4 x16"),
    GpuType("rtx-4090", 165, 24, 1008, 32, 12.5, "NVIDIA Ada architecture paper; PCIe 4 x16"),
    GpuType("mi300x", 1307, 192, 5300, 448, 50, "AMD MI300X datasheet; 7 links of 128 GB/s"),
    GpuType(
        "ascend-910b",
        313,
        64,
        1600,
        196,
        25,
        "Huawei publishes no datasheet of it: as operators of Atlas 800T A2 state it; measure",
    ),
)
"""Peaks. What of them is reached is for the prediction to say."""


def gpu_type(name: str) -> GpuType:
    """The accelerator of a name, in any case, with ``-``, ``_`` or a space between its parts.

    Raises:
        ParallelConfigError: None is called so; names those that are known.
    """
    wanted = "-".join(name.lower().replace("_", " ").replace("-", " ").split())
    for gpu in GPU_TYPES:
        if gpu.name == wanted:
            return gpu
    from omni_group_coordinator import ParallelConfigError  # torch comes with it

    known = ", ".join(gpu.name for gpu in GPU_TYPES)
    msg = (
        f"--gpu {name}: not known; known: {known}. For another one give the nearest, and what "
        "differs by --tflops, --memory, --bandwidth, --link and --node-link"
    )
    raise ParallelConfigError(msg)
