"""The usual way of doing the same, for comparison."""
