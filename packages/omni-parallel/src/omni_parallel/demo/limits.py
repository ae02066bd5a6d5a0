"""What the options of the demonstration may be."""

DEFAULT_RANKS = 2
MAX_RANKS = 64
MAX_SIZE = 512
"""Longest side of a picture, in pixels; the model was trained on far smaller ones."""
