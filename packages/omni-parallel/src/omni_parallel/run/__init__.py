"""``omni-parallel run``: a user's script on several ranks."""
