"""``omni-parallel completion``: what a shell completes."""
