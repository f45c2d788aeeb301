"""Event types, public."""

from enum import StrEnum
from typing import Final


class EventType(StrEnum):
    """Type of an event, as in subscriptions and webhooks."""

    JOB_STARTED = "job.started"
    JOB_SUCCEEDED = "job.succeeded"
    JOB_FAILED = "job.failed"
    JOB_CANCELED = "job.canceled"
    JOB_EXPIRED = "job.expired"
    BATCH_COMPLETED = "batch.completed"
    BATCH_CANCELED = "batch.canceled"
    WEBHOOK_TEST = "webhook.test"  #: sent on request, to one endpoint
    WEBHOOK_DISABLED = "webhook.disabled"  #: an endpoint gets no more deliveries


OF_JOBS: Final = tuple(kind for kind in EventType if kind.startswith("job."))
#: Sent to the webhook URL of a job that names no types.
JOB_ENDS: Final = tuple(kind for kind in OF_JOBS if kind is not EventType.JOB_STARTED)
#: Types an endpoint may subscribe to; a test needs no subscription.
SUBSCRIBABLE: Final = tuple(kind for kind in EventType if kind is not EventType.WEBHOOK_TEST)
