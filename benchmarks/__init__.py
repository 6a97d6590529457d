"""Benchmarks; each prints a ratio or a share against a named baseline of the same run."""
