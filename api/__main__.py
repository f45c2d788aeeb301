"""`python -m api`: the HTTP server."""

import argparse
import gc
import ipaddress
import socket
import sys
from collections.abc import Callable
from contextlib import suppress

import uvicorn

from api.app import create_app
from darkroom.errors import SetupError
from darkroom.health import print_checks
from darkroom.settings import Settings, load_settings


def main() -> int:
    """Serve until SIGTERM, which lets requests in flight finish."""
    parser = argparse.ArgumentParser(
        prog="python -m api",
        description="The HTTP API: takes jobs and batches, answers polls.",
        epilog="Configured by DARKROOM_* variables; see .env.example.",
    )
    parser.add_argument("--check", action="store_true", help="only check what it would connect to")
    arguments = parser.parse_args()
    settings = load_settings()
    if arguments.check:
        return print_checks(settings)
    try:
        require_loopback_without_auth(settings)
        app = create_app(settings)
        _interleave()
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    config = uvicorn.Config(
        app,
        host=settings.api_host,
        port=settings.api_port,
        timeout_graceful_shutdown=10,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 * 2**10,
    )
    server = Server(config, on_leaving=app.state.tools.streams.end)
    with suppress(KeyboardInterrupt):  # which it raises again when it has shut down
        server.run()
    return 0 if server.started else 1


def _interleave() -> None:
    """Let threads that mostly wait run soon, though another reads a file of 100,000 rows.

    By default a thread that comes back from waiting is given the interpreter after 5 ms: the one
    that feeds the database loses that long for each piece it has sent, and the event loop for each
    request. What the process was built of lives as long as it: no need to search it for garbage.
    """
    sys.setswitchinterval(0.0005)
    gc.collect()
    gc.freeze()


class Server(uvicorn.Server):
    """Says when it is about to leave: streams, which wait themselves, must not be waited for."""

    def __init__(self, config: uvicorn.Config, *, on_leaving: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_leaving = on_leaving

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Lets requests in flight finish."""
        self._on_leaving()
        await super().shutdown(sockets)


def require_loopback_without_auth(settings: Settings) -> None:
    """Raises SetupError when anybody who reaches the port could use it without a key."""
    if settings.auth == "on" or _is_loopback(settings.api_host):
        return
    raise SetupError(
        f"DARKROOM_AUTH=off, but DARKROOM_API_HOST={settings.api_host} is not loopback: "
        "anybody could submit jobs. Set DARKROOM_AUTH=on, or listen on 127.0.0.1"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
