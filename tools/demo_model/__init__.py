"""Trains the small text-to-image model that the demonstration of omni-parallel runs."""
