"""Tenants and their API keys: who may do what."""
