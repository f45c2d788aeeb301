"""Measurements, each a command: `python -m benchmarks.NAME`. README.md lists them."""
