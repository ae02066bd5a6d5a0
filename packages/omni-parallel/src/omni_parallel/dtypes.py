"""Precisions of a model, by name."""

DTYPES = ("float32", "bfloat16", "float16")
