"""Preloaded into the fork server, and into nothing else, for the effect of its import.

The fork server would outlive a killed pytest for as long as one rank is busy, and the ranks
ask the kernel to be killed when the fork server ends: so it must end with pytest.
"""

from rank_harness.lifetime import end_with_parent

end_with_parent()
