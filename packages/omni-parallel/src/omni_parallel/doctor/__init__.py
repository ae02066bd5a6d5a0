"""``omni-parallel doctor``: what is here, whether ranks can talk, and what is wrong."""
