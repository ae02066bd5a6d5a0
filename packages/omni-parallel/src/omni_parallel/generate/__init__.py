"""``omni-parallel generate``: images or videos of any pipeline of diffusers, on several ranks."""
