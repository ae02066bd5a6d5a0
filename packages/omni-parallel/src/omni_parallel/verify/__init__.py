"""``omni-parallel verify``: whether a layout makes what one process makes, and how fast."""
