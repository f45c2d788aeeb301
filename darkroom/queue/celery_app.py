"""Celery configuration, and the names of tasks and queues that sender and worker share."""

from typing import Final

from celery import Celery
from kombu import Queue

from darkroom.settings import Settings

PROCESS_QUEUE: Final = "darkroom.process_queue"  #: task that claims until the queue is empty
GENERATE_QUEUE: Final = "generate"  #: its queue
SEND_WEBHOOKS: Final = "darkroom.send_webhooks"  #: task that wakes a webhook sender
WEBHOOK_QUEUE: Final = "webhooks"  #: its queue
KEY_PREFIX: Final = "darkroom:"


def celery_app(settings: Settings, *, socket_timeout_s: float) -> Celery:
    """Return a Celery app for at-most-once hints without results.

    `socket_timeout_s` bounds every command: a Redis that accepts connections but never answers
    would otherwise block its caller forever.
    """
    app = Celery("darkroom", broker=settings.redis_url.get_secret_value(), set_as_current=False)
    app.conf.update(
        result_backend=None,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_queues=[Queue(GENERATE_QUEUE), Queue(WEBHOOK_QUEUE)],
        task_default_queue=GENERATE_QUEUE,
        task_create_missing_queues=False,
        task_acks_late=False,  # a lost hint costs one interval, a late-acked one up to 1 h
        task_publish_retry=False,  # the reaper sends another hint; no request waits for Redis
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,  # hints that no worker started stay in Redis
        worker_redirect_stdouts=False,  # otherwise ray.init() fails
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_send_task_events=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "global_keyprefix": KEY_PREFIX,
            "visibility_timeout": 3600,
            "socket_timeout": socket_timeout_s,
            "socket_connect_timeout": min(2.0, socket_timeout_s),
            "socket_keepalive": True,
            "health_check_interval": 25,
        },
    )
    return app
