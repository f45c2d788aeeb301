"""The public names of what can happen."""

from enum import StrEnum
from typing import Final


class EventType(StrEnum):
    """Public: what a subscription asks for, and what a webhook is called."""

    JOB_STARTED = "job.started"
    JOB_SUCCEEDED = "job.succeeded"
    JOB_FAILED = "job.failed"
    JOB_CANCELED = "job.canceled"
    JOB_EXPIRED = "job.expired"
    BATCH_COMPLETED = "batch.completed"
    BATCH_CANCELED = "batch.canceled"
    WEBHOOK_TEST = "webhook.test"  #: sent on request, to one endpoint
    WEBHOOK_DISABLED = "webhook.disabled"  #: an endpoint is called no more


OF_JOBS: Final = tuple(kind for kind in EventType if kind.startswith("job."))
#: What the URL of a job is told unless it asks for others.
JOB_ENDS: Final = tuple(kind for kind in OF_JOBS if kind is not EventType.JOB_STARTED)
#: What an endpoint may ask for; a test comes without being asked for.
SUBSCRIBABLE: Final = tuple(kind for kind in EventType if kind is not EventType.WEBHOOK_TEST)
