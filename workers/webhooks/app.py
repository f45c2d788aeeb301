"""`python -m workers send-webhooks`: Celery worker that sends webhooks.

It is a process of its own, with its own user and queue, because it connects to foreign servers: it
holds no storage key, knows no replica, and a firewall can keep it from the private network
(deploy/nftables).
"""

import argparse
import asyncio
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Sequence
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
    """Thread that runs the sender on an event loop of its own."""

    settings: Settings
    loop: asyncio.AbstractEventLoop | None = None
    sender: Sender | None = None
    thread: threading.Thread | None = None
    started: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Start the thread and wait until the sender is open."""
        self.thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self.thread.start()
        self.started.wait()

    def wake(self) -> None:
        """Make the sender claim soon. Call it from any thread."""
        if self.loop is not None and self.sender is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.sender.wake)

    def close(self) -> None:
        """Finish the attempts in flight within 30 s and release the rest."""
        if self.loop is not None and self.sender is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.sender.stop)
        if self.thread is not None:
            self.thread.join(_STOP_WITHIN_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._send())
        except Exception:  # any: a process that sends nothing must not look alive
            logger.exception("webhook sender crashed; exiting for a restart")
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            self.started.set()

    async def _send(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.sender = open_sender(self.settings)
        self.started.set()
        await self.sender.run()


def open_sender(settings: Settings) -> Sender:
    """Return a sender for these settings. Raise SetupError or OSError."""
    policy = url_policy.policy_of(settings)
    transport = WebhookTransport(
        policy,
        SystemResolver() if policy.private else DnsResolver(),
        tls=tls_context(settings.webhook_ca_file),
        timeout_s=settings.webhook_timeout_s,
    )
    return Sender(
        open_sessions(settings.database_url.get_secret_value(), pool_size=2),
        transport.post,
        DestinationLimiter(_max_connections(settings.webhook_max_connections)),
        secret_box=SecretBox(settings.webhook_encryption_keys.get_secret_value()),
        private_keys=signatures.private_keys(settings.webhook_signing_key.get_secret_value()),
    )


def _max_connections(wanted: int) -> int:
    """Raise the limit of open files as needed; return how many connections it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHER_FILES
    if soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
        soft = max(soft, allowed)
    possible = max(16, min(wanted, soft - _OTHER_FILES))
    if possible < wanted:
        logger.warning(
            "at most %d webhooks in flight instead of %d: the limit of open files is %d",
            possible,
            wanted,
            soft,
        )
    return possible


def webhook_app(settings: Settings, sender: SenderThread, *, ready_file: Path | None) -> Celery:
    """Return the Celery app whose task wakes the sender, and whose signals start and close it."""
    app = celery_app.celery_app(settings, socket_timeout_s=5)

    @app.task(name=celery_app.SEND_WEBHOOKS)
    def _wake() -> None:
        sender.wake()

    def _init(**_: object) -> None:
        notifier.clear_queue(settings, celery_app.WEBHOOK_QUEUE)

    def _ready(**_: object) -> None:
        sender.start()
        if ready_file is not None:
            ready_file.touch()

    def _shutdown(**_: object) -> None:
        sender.close()

    signals.worker_init.connect(_init, weak=False)  # closures have no other owner
    signals.worker_ready.connect(_ready, weak=False)
    signals.worker_shutdown.connect(_shutdown, weak=False)
    return app


def celery_arguments() -> Sequence[str]:
    """Return Celery's arguments: one thread, since its task only wakes the sender."""
    return [
        "worker",
        "--pool=threads",
        "--concurrency=1",
        f"--queues={celery_app.WEBHOOK_QUEUE}",
        f"--hostname=webhooks-{os.getpid()}@%h",
        "--without-gossip",
        "--without-mingle",
        "--without-heartbeat",
        "--loglevel=INFO",
    ]


def main(arguments: Sequence[str]) -> int:
    """Send webhooks until SIGTERM; attempts in flight then finish."""
    parser = argparse.ArgumentParser(
        prog="python -m workers send-webhooks",
        description="Send webhooks: claim due deliveries, sign and POST them, store the results.",
        epilog="Configured by DARKROOM_* variables; see .env.example.",
    )
    parser.add_argument(
        "--check", action="store_true", help="only check that PostgreSQL and Redis answer"
    )
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
    try:
        asyncio.run(_check_settings(settings))
    except (SetupError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sender = SenderThread(settings)
    app = webhook_app(settings, sender, ready_file=Path(ready_file) if ready_file else None)
    start: Callable[[list[str]], int | None] = app.start  # its types say that it never returns
    return start(list(celery_arguments())) or 0  # None after a warm shutdown


async def _check_settings(settings: Settings) -> None:
    """Fail at the start, in one line, for settings that cannot be used."""
    open_sender(settings)
