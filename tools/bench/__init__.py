"""Benchmarks that run the rivals beside this repository's packages, in the same run."""
