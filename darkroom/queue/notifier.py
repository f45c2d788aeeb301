"""Wake-up hints to workers and webhook senders: a doorbell, whose messages may be lost."""

import logging
import threading

from kombu.exceptions import OperationalError
from redis import RedisError

from darkroom.periodic import PeriodicTask
from darkroom.queue.celery_app import (
    _PREFIX,
    GENERATE_QUEUE,
    PROCESS_QUEUE,
    SEND_WEBHOOKS,
    WEBHOOK_QUEUE,
    celery_app,
)
from darkroom.redis_client import open_redis
from darkroom.settings import Settings

logger = logging.getLogger(__name__)


def clear_queue(settings: Settings, name: str) -> None:
    """Delete the messages of a queue before a worker, which looks at the database, listens to it.

    Hints may be lost. A message that is no hint has to go: the worker that takes it dies (kombu
    decodes before our code is called), and so would each of its successors.
    """
    try:
        with open_redis(settings) as redis:
            redis.delete(_PREFIX + name)
    except RedisError as error:
        logger.warning("could not clear queue %s: %s; the worker starts with it", name, error)


class WorkNotifier:
    """Publisher of hints, in a thread of its own, so that no request waits for Redis."""

    def __init__(self, settings: Settings) -> None:
        self._celery = celery_app(settings, socket_timeout_s=1)
        self._redis = open_redis(settings)
        self._slots = settings.worker_concurrency
        self._deliveries = threading.Event()
        self._task = PeriodicTask(
            "wake-up-hints",
            self._publish,
            transient=(RedisError, OperationalError, OSError),
            on_failure="workers find the jobs at the next maintenance pass",
        )
        self._task.start()

    def notify_workers(self) -> None:
        """Publish soon that jobs are queued. Return at once; calls during a publish become one."""
        self._task.wake()

    def notify_webhook_senders(self) -> None:
        """Publish soon that webhooks may be due. Return at once."""
        self._deliveries.set()
        self._task.wake()

    def close(self) -> None:
        """End the thread; a hint being published is finished or times out."""
        self._task.close()

    def _publish(self) -> None:
        """Fill up to one hint per slot. A hint that is still queued will see our rows as well."""
        queued = self._redis.llen(_PREFIX + GENERATE_QUEUE)
        for _ in range(self._slots - int(queued)):
            self._celery.send_task(PROCESS_QUEUE, queue=GENERATE_QUEUE)
        if self._deliveries.is_set():
            self._deliveries.clear()
            if not self._redis.llen(_PREFIX + WEBHOOK_QUEUE):
                self._celery.send_task(SEND_WEBHOOKS, queue=WEBHOOK_QUEUE)
