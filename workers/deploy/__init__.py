"""Deployment of models to Ray Serve: serve, replace, scale."""
