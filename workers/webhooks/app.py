"""`python -m workers send-webhooks`: a Celery worker that sends webhooks.

A process of its own, with its own user and queue: it speaks with strangers, and so it holds no
storage key, knows no replica, and can be kept from the network inside (deploy/nftables).
"""

import argparse
import asyncio
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from celery import Celery, signals

from darkroom import redis_client
from darkroom.db.connection import open_sessions
from darkroom.errors import SetupError
from darkroom.health import database_check, print_results, run_checks
from darkroom.queue import celery_app, notifier
from darkroom.settings import Settings, load_settings
from darkroom.webhooks import signatures, url_policy
from darkroom.webhooks.secret_box import SecretBox
from workers.webhooks.circuit_breaker import DestinationLimiter
from workers.webhooks.resolver import DnsResolver, SystemResolver
from workers.webhooks.sender import Sender
from workers.webhooks.transport import WebhookTransport, tls_context

_OTHER_FILES: Final = 100  #: descriptors for the database, Redis, logs
_STOP_WITHIN_S: Final = 30.0

logger = logging.getLogger(__name__)


@dataclass
class SenderThread:
    """The sender in its thread with its event loop."""

    settings: Settings
    loop: asyncio.AbstractEventLoop | None = None
    sender: Sender | None = None
    thread: threading.Thread | None = None
    opened: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Begin to send."""
        self.thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self.thread.start()
        self.opened.wait()

    def wake(self) -> None:
        """There is something due. From any thread."""
        if self.loop is not None and self.sender is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.sender.wake)

    def close(self) -> None:
        """What is in flight is finished, the rest handed back."""
        if self.loop is not None and self.sender is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.sender.stop)
        if self.thread is not None:
            self.thread.join(_STOP_WITHIN_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._send())
        except Exception:  # whatever it was: a process that sends nothing must not look alive
            logger.exception("the sender fell over; leaving, to be started anew")
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            self.opened.set()

    async def _send(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.sender = open_sender(self.settings)
        self.opened.set()
        await self.sender.run()


def open_sender(settings: Settings) -> Sender:
    """A sender as the settings say. Raises SetupError, OSError."""
    policy = url_policy.policy_of(settings)
    outbound = WebhookTransport(
        policy,
        SystemResolver() if policy.private else DnsResolver(),
        tls=tls_context(settings.webhook_ca_file),
        timeout_s=settings.webhook_timeout_s,
    )
    return Sender(
        open_sessions(settings.database_url.get_secret_value(), pool_size=2),
        outbound.post,
        DestinationLimiter(_sockets(settings.webhook_max_connections)),
        seal=SecretBox(settings.webhook_encryption_keys.get_secret_value()),
        private=signatures.private_keys(settings.webhook_signing_key.get_secret_value()),
    )


def _sockets(wanted: int) -> int:
    """As many as wanted, or as the system lets us have files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHER_FILES
    if soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
        soft = max(soft, allowed)
    possible = max(16, min(wanted, soft - _OTHER_FILES))
    if possible < wanted:
        logger.warning("only %d webhooks in flight: the limit of open files is %d", possible, soft)
    return possible


def delivery_app(settings: Settings, room: SenderThread, *, ready_file: Path | None) -> Celery:
    """The Celery app with its task and its life wired up."""
    app = celery_app.celery_app(settings, socket_timeout_s=5)

    @app.task(name=celery_app.SEND_WEBHOOKS)
    def _deliver() -> None:
        room.wake()

    def _init(**_: object) -> None:
        notifier.clear_queue(settings, celery_app.WEBHOOK_QUEUE)

    def _ready(**_: object) -> None:
        room.start()
        if ready_file is not None:
            ready_file.touch()

    def _shutdown(**_: object) -> None:
        room.close()

    signals.worker_init.connect(_init, weak=False)  # closures have no other owner
    signals.worker_ready.connect(_ready, weak=False)
    signals.worker_shutdown.connect(_shutdown, weak=False)
    return app


def celery_arguments() -> Sequence[str]:
    """One thread: its task only rings the sender's notifier."""
    return [
        "worker",
        "--pool=threads",
        "--concurrency=1",
        f"--queues={celery_app.WEBHOOK_QUEUE}",
        f"--hostname=delivery-{os.getpid()}@%h",
        "--without-gossip",
        "--without-mingle",
        "--without-heartbeat",
        "--loglevel=INFO",
    ]


def main(arguments: Sequence[str]) -> int:  # noqa: RET503  # Celery's worker_main does not return
    """Send until SIGTERM, which lets the attempts in flight finish."""
    parser = argparse.ArgumentParser(
        prog="python -m workers send-webhooks",
        description="Sends webhooks: claims what is due, signs it, posts it, records how it went.",
        epilog="Configured by DARKROOM_* variables; see .env.example.",
    )
    parser.add_argument("--check", action="store_true", help="only check what it would connect to")
    asked = parser.parse_args(arguments)
    settings = load_settings()
    if asked.check:
        sessions = open_sessions(settings.database_url.get_secret_value(), pool_size=1)
        checks = {
            "database": database_check(sessions),
            "redis": redis_client.open_redis(settings).ping,
        }
        return print_results(run_checks(checks))
    ready_file = os.environ.get("DARKROOM_READY_FILE")
    room = SenderThread(settings)
    try:
        asyncio.run(_try_out(settings))
    except (SetupError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    app = delivery_app(settings, room, ready_file=Path(ready_file) if ready_file else None)
    app.worker_main(list(celery_arguments()))  # ends the process itself


async def _try_out(settings: Settings) -> None:
    """A setting that cannot be used is told at the start, in one line."""
    open_sender(settings)
