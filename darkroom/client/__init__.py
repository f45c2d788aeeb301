"""Python client of the HTTP API. It imports nothing of the server."""

from darkroom.client.http import Client

__all__ = ["Client"]
