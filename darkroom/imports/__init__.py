"""Imports: reading a file of rows, validating it, and creating a batch of it."""
