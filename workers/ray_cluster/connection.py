"""Connection to the Ray cluster."""

import socket

import ray


def connect_to_ray(address: str) -> None:
    """Make this process a driver of the cluster. Raises ConnectionError and similar at once."""
    ray.init(address=address, namespace="serve", log_to_driver=False, configure_logging=False)


def check_ray(address: str) -> None:
    """Raise OSError unless a server listens at the cluster's address."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=2).close()
