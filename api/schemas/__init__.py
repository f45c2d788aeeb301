"""Pydantic models of what clients send and read."""
