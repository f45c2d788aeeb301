"""Notifier of workers and webhook senders: hints by Celery, any of which may be lost."""

import logging
import threading

from kombu.exceptions import OperationalError
from redis import RedisError

from darkroom.periodic import PeriodicTask
from darkroom.queue.celery_app import (
    GENERATE_QUEUE,
    KEY_PREFIX,
    PROCESS_QUEUE,
    SEND_WEBHOOKS,
    WEBHOOK_QUEUE,
    celery_app,
)
from darkroom.redis_client import open_redis
from darkroom.settings import Settings

logger = logging.getLogger(__name__)


def clear_queue(settings: Settings, name: str) -> None:
    """Remove all messages of a Celery queue before a worker starts to consume it.

    Hints may be lost, because a worker looks for jobs when it starts. A message that is not a hint
    must go: kombu decodes it before any of our code runs, and every worker that takes it would die.
    """
    try:
        with open_redis(settings) as redis:
            redis.delete(KEY_PREFIX + name)
    except RedisError as error:
        logger.warning("could not clear queue %s: %s; its messages stay", name, error)


class WorkNotifier:
    """Notifier with a thread of its own, so that no request waits for Redis."""

    def __init__(self, settings: Settings) -> None:
        self._celery = celery_app(settings, socket_timeout_s=1)
        self._redis = open_redis(settings)
        self._slots = settings.worker_concurrency
        self._webhooks_due = threading.Event()
        self._task = PeriodicTask(
            "wake-up-hints",
            self._publish,
            transient=(RedisError, OperationalError, OSError),
            on_failure="workers find the jobs at the next maintenance pass",
        )
        self._task.start()

    def notify_workers(self) -> None:
        """Tell workers that jobs may be queued. Return at once; several calls may send one hint."""
        self._task.wake()

    def notify_webhook_senders(self) -> None:
        """Tell webhook senders that deliveries may be due. Return at once."""
        self._webhooks_due.set()
        self._task.wake()

    def close(self) -> None:
        """Stop the thread, after the hint that it is sending."""
        self._task.close()

    def _publish(self) -> None:
        """Send hints up to one per worker slot; those already in Redis serve our rows as well."""
        pending = self._redis.llen(KEY_PREFIX + GENERATE_QUEUE)
        for _ in range(self._slots - int(pending)):
            self._celery.send_task(PROCESS_QUEUE, queue=GENERATE_QUEUE)
        if self._webhooks_due.is_set():
            self._webhooks_due.clear()
            if not self._redis.llen(KEY_PREFIX + WEBHOOK_QUEUE):
                self._celery.send_task(SEND_WEBHOOKS, queue=WEBHOOK_QUEUE)
