"""Denoise loop: turns a microbatch into pixels. Importing this package loads nothing heavy."""
