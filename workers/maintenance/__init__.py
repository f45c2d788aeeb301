"""Periodic work on the database and the store."""
