"""Schedulers whose step treats every element of the latents alone."""

from __future__ import annotations

from typing import Any

from omni_group_coordinator import ParallelConfigError

ELEMENTWISE: frozenset[str] = frozenset(
    {
        "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler",
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "EDMDPMSolverMultistepScheduler",
        "EDMEulerScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "HeunDiscreteScheduler",
        "IPNDMScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "SASolverScheduler",
        "TCDScheduler",
        "UniPCMultistepScheduler",
    }
)
"""Classes of diffusers 0.42 whose formulas are sums and products of elements at one place, and of
noise that is drawn for all of them. Options that look further are in `MIXING`."""

MIXING: dict[str, str] = {
    "thresholding": "it scales each sample by a quantile of all its elements",
    "scale_factors": "it changes the size of the latents between steps",
}
"""Options of a scheduler's config by which elements meet, and how."""


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler in whose step elements of the latents meet.

    Raises:
        ParallelConfigError: Its class is not known to treat every element alone, or an option that
            is on does not.
    """
    name = type(scheduler).__name__
    names = {cls.__name__ for cls in type(scheduler).__mro__}
    if not names & ELEMENTWISE:
        msg = (
            f"PipeFusion needs a scheduler whose step treats every element of the latents alone, "
            f"and {name} is not known to; legal: {', '.join(sorted(ELEMENTWISE))}"
        )
        raise ParallelConfigError(msg)
    config = getattr(scheduler, "config", {})
    for option, reason in MIXING.items():
        if config.get(option):
            msg = (
                f"PipeFusion cannot run with {option}={config.get(option)!r} of {name}: {reason}; "
                f"legal: {option} off"
            )
            raise ParallelConfigError(msg)
