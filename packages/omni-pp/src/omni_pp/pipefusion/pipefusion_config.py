"""How the image tokens of a call are cut into patches, and how many steps are exact before."""

from __future__ import annotations

from dataclasses import dataclass

from omni_group_coordinator import ParallelConfigError


@dataclass(frozen=True)
class PipeFusionConfig:
    """Configuration of `apply_pipefusion`.

    Raises:
        ParallelConfigError: A value is not among the legal ones.
    """

    patches: int = 2
    """Parts into which the image tokens of a call are cut, along the sequence; their lengths differ
    by one token at most. After the exact steps ``S`` stages take ``1 / S`` of one rank's time, if
    there are some more patches than stages and each is long enough to be worth reading the
    weights. 1: calls stay whole, and are exact."""

    warmup_steps: int = 1
    """Steps at the beginning of a request that are computed exactly, and fill the caches. A step
    is what lies between two steps of the scheduler."""

    force: bool = False
    """Run also where `fewest_steps` says that the result strays too far from the exact one."""

    def __post_init__(self) -> None:
        for name in ("patches", "warmup_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                msg = f"{name}={value!r}; legal: a whole number from 1"
                raise ParallelConfigError(msg)
        if not isinstance(self.force, bool):
            msg = f"force={self.force!r}; legal: True, False"
            raise ParallelConfigError(msg)
