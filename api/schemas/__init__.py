"""Shapes of what clients send and receive, as the OpenAPI document names them."""
