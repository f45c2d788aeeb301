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
    """Serve until SIGTERM; requests in flight are finished first."""
    parser = argparse.ArgumentParser(
        prog="python -m api",
        description="HTTP API: accepts jobs and batches, serves their results.",
        epilog="Configured by DARKROOM_* variables; see .env.example.",
    )
    parser.add_argument("--check", action="store_true", help="only check the connections")
    arguments = parser.parse_args()
    settings = load_settings()
    if arguments.check:
        return print_checks(settings)
    try:
        require_loopback_without_auth(settings)
        app = create_app(settings)
        _tune_interpreter()
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
    server = Server(config, on_exit=app.state.deps.streams.end)
    with suppress(KeyboardInterrupt):  # which uvicorn raises again after its shutdown
        server.run()
    return 0 if server.started else 1


def _tune_interpreter() -> None:
    """Let threads that mostly wait run soon while another one imports 100,000 rows.

    By default a thread that returns from waiting gets the interpreter after 5 ms: the importer
    loses that long for each chunk that it sends to the database, and the event loop for each
    request. The objects made at start live as long as the process and need no garbage collection.
    """
    sys.setswitchinterval(0.0005)
    gc.collect()
    gc.freeze()


class Server(uvicorn.Server):
    """Server that ends event streams first: its shutdown would wait for them."""

    def __init__(self, config: uvicorn.Config, *, on_exit: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_exit = on_exit

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams, then let requests in flight finish."""
        self._on_exit()
        await super().shutdown(sockets)


def require_loopback_without_auth(settings: Settings) -> None:
    """Raise SetupError if the port would be open to other machines without keys."""
    if settings.auth == "on" or _is_loopback(settings.api_host):
        return
    raise SetupError(
        f"DARKROOM_AUTH=off, but DARKROOM_API_HOST={settings.api_host} is not loopback: "
        "every host that reaches it could submit jobs. Set DARKROOM_AUTH=on or listen on 127.0.0.1"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
