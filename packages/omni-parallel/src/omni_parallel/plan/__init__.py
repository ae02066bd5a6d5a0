"""``omni-parallel plan``: what each legal layout would send, hold and take, before any is tried."""
