"""Baselines: the usual way to do the same, for comparison."""
