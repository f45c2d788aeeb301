"""Redis client."""

from redis import Redis

from darkroom.settings import Settings


def open_redis(settings: Settings, *, timeout_s: float = 1) -> Redis:
    """Return a client with a timeout for every command."""
    return Redis.from_url(
        settings.redis_url.get_secret_value(),
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
    )
