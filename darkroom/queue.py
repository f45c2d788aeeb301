"""The doorbell: Celery messages that say `there is work`. Any of them may be lost."""

import logging
import threading
from typing import Final

from celery import Celery
from kombu import Queue
from kombu.exceptions import OperationalError
from redis import Redis, RedisError

from darkroom.settings import Settings

PUMP: Final = "darkroom.pump"  #: the task that claims until nothing is left
GENERATE: Final = "generate"  #: its queue
DELIVER: Final = "darkroom.deliver"  #: the task that wakes a sender of webhooks
DELIVERIES: Final = "deliver"  #: its queue
_PREFIX: Final = "darkroom:"

logger = logging.getLogger(__name__)


def celery_app(settings: Settings, *, socket_timeout_s: float) -> Celery:
    """Celery as this project uses it: at-most-once hints without results.

    `socket_timeout_s` bounds every command: a Redis that accepts but never answers would
    otherwise block its caller for ever.
    """
    app = Celery("darkroom", broker=settings.redis_url.get_secret_value(), set_as_current=False)
    app.conf.update(
        result_backend=None,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_queues=[Queue(GENERATE), Queue(DELIVERIES)],
        task_default_queue=GENERATE,
        task_create_missing_queues=False,
        task_acks_late=False,  # a lost hint costs one sweep; a late-acked one may stall an hour
        task_publish_retry=False,  # the sweeper rings again; nobody waits for Redis
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,  # hints not yet begun stay in Redis
        worker_redirect_stdouts=False,  # otherwise ray.init() fails
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_send_task_events=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "global_keyprefix": _PREFIX,
            "visibility_timeout": 3600,
            "socket_timeout": socket_timeout_s,
            "socket_connect_timeout": min(2.0, socket_timeout_s),
            "socket_keepalive": True,
            "health_check_interval": 25,
        },
    )
    return app


def open_redis(settings: Settings, *, timeout_s: float = 1) -> Redis:
    """A client whose every command ends in time."""
    return Redis.from_url(
        settings.redis_url.get_secret_value(),
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
    )


def clear(settings: Settings, name: str) -> None:
    """Remove what hangs in a queue, before a worker that will look for itself listens to it.

    Hints may be lost; what is no hint at all must be: a worker that takes it dies of it (kombu
    decodes before anybody is asked), and so would each of its successors.
    """
    try:
        with open_redis(settings) as redis:
            redis.delete(_PREFIX + name)
    except RedisError as error:
        logger.warning("queue %s was not cleared: %s", name, error)


class Bell:
    """Rings for the workers from a thread of its own, so that no request waits for Redis."""

    def __init__(self, settings: Settings) -> None:
        self._celery = celery_app(settings, socket_timeout_s=1)
        self._redis = open_redis(settings)
        self._slots = settings.dispatches_in_flight
        self._wanted = threading.Event()
        self._deliveries = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bell", daemon=True)
        self._thread.start()

    def ring(self) -> None:
        """There is work. Returns at once; rings that come while one is under way become one."""
        if not self._wanted.is_set():  # to look is cheap, to set wakes whoever waits
            self._wanted.set()

    def ring_deliveries(self) -> None:
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
                logger.warning("the bell could not ring, the sweeper will: %s", error)
            except Exception:  # whatever it was: a thread that ends silently is worse
                logger.exception("the bell could not ring, the sweeper will")

    def _publish(self) -> None:
        """Fill up to one hint per slot. One that still hangs there will see our rows as well."""
        hanging = self._redis.llen(_PREFIX + GENERATE)
        for _ in range(self._slots - int(hanging)):
            self._celery.send_task(PUMP, queue=GENERATE)
        if self._deliveries.is_set():
            self._deliveries.clear()
            if not self._redis.llen(_PREFIX + DELIVERIES):
                self._celery.send_task(DELIVER, queue=DELIVERIES)
