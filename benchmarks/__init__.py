"""Measurements: each writes one file under `benchmarks/results/`."""
