"""The doorbell: Celery messages that say `there is work`. Any of them may be lost."""

import logging
import threading

from kombu.exceptions import OperationalError
from redis import RedisError

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
    """Remove what hangs in a queue, before a worker that will look for itself listens to it.

    Hints may be lost; what is no hint at all must be: a worker that takes it dies of it (kombu
    decodes before anybody is asked), and so would each of its successors.
    """
    try:
        with open_redis(settings) as redis:
            redis.delete(_PREFIX + name)
    except RedisError as error:
        logger.warning("queue %s was not cleared: %s", name, error)


class WorkNotifier:
    """Rings for the workers from a thread of its own, so that no request waits for Redis."""

    def __init__(self, settings: Settings) -> None:
        self._celery = celery_app(settings, socket_timeout_s=1)
        self._redis = open_redis(settings)
        self._slots = settings.worker_concurrency
        self._wanted = threading.Event()
        self._deliveries = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="notifier", daemon=True)
        self._thread.start()

    def notify_workers(self) -> None:
        """There is work. Returns at once; rings that come while one is under way become one."""
        if not self._wanted.is_set():  # to look is cheap, to set wakes whoever waits
            self._wanted.set()

    def notify_webhook_senders(self) -> None:
        """Something ended that somebody may want to be told of. Returns at once."""
        self._deliveries.set()
        self._wanted.set()

    def close(self) -> None:
        """Let the thread end; a ring under way is finished or times out."""
        self._closing.set()
        self._wanted.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._closing.is_set():
                return
            try:
                self._publish()
            except (RedisError, OperationalError, OSError) as error:
                logger.warning("the notifier could not ring, the sweeper will: %s", error)
            except Exception:  # whatever it was: a thread that ends silently is worse
                logger.exception("the notifier could not ring, the sweeper will")

    def _publish(self) -> None:
        """Fill up to one hint per slot. One that still hangs there will see our rows as well."""
        hanging = self._redis.llen(_PREFIX + GENERATE_QUEUE)
        for _ in range(self._slots - int(hanging)):
            self._celery.send_task(PROCESS_QUEUE, queue=GENERATE_QUEUE)
        if self._deliveries.is_set():
            self._deliveries.clear()
            if not self._redis.llen(_PREFIX + WEBHOOK_QUEUE):
                self._celery.send_task(SEND_WEBHOOKS, queue=WEBHOOK_QUEUE)
