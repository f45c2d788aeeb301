"""Statuses with their transitions, and every other enum that clients see."""

from enum import StrEnum
from typing import Final, Self


class Status(StrEnum):
    """Status of a job, as clients see it."""

    QUEUED = "queued"  #: waiting for a worker; the row itself is the queue entry
    RUNNING = "running"  #: claimed by one dispatch, in one microbatch
    SUCCEEDED = "succeeded"  #: its image is in the store
    FAILED = "failed"  #: it is not attempted again; `error` says why
    CANCELED = "canceled"  #: on request of the client
    EXPIRED = "expired"  #: a deadline passed before its image was generated


TRANSITIONS: Final[dict[Status, frozenset[Status]]] = {
    Status.QUEUED: frozenset({Status.RUNNING, Status.CANCELED, Status.EXPIRED}),
    Status.RUNNING: frozenset(
        {Status.SUCCEEDED, Status.FAILED, Status.QUEUED, Status.CANCELED, Status.EXPIRED}
    ),
    Status.SUCCEEDED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELED: frozenset(),
    Status.EXPIRED: frozenset(),
}
FINISHED: Final = frozenset(status for status, onward in TRANSITIONS.items() if not onward)


class DispatchStatus(StrEnum):
    """Status of a dispatch, one claim of a microbatch. Only a running one may settle jobs."""

    RUNNING = "running"  #: leased; its worker renews it
    FINISHED = "finished"  #: its results are committed
    EXPIRED = "expired"  #: its worker stopped renewing; its jobs are suspects
    CRASHED = "crashed"  #: its replica died or hung; its jobs are suspects
    RELEASED = "released"  #: its worker requeued jobs for a fault that was not theirs


class DeliveryStatus(StrEnum):
    """Status of a webhook delivery, as clients see it."""

    PENDING = "pending"  #: waiting for its first or next attempt
    SENDING = "sending"  #: claimed by a sender
    ACCEPTED = "accepted"  #: the receiver answered 2xx
    EXHAUSTED = "exhausted"  #: all attempts failed; it can be replayed


class Priority(StrEnum):
    """Service class of a job, in the order in which they are claimed."""

    INTERACTIVE = "interactive"
    NORMAL = "normal"
    BULK = "bulk"

    @classmethod
    def from_rank(cls, rank: int) -> Self:
        """Return the priority of a rank, which is how tables store it."""
        return list(cls)[rank]


PRIORITY_RANK: Final = {priority: rank for rank, priority in enumerate(Priority)}


class BatchStatus(StrEnum):
    """Status of a batch, derived from its jobs."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    CANCELED = "canceled"


class BatchOutcome(StrEnum):
    """Result of a completed batch."""

    ALL_SUCCEEDED = "all_succeeded"
    PARTIAL = "partial"
    ALL_FAILED = "all_failed"


class Scope(StrEnum):
    """Permission of an API key."""

    SUBMIT = "submit"
    READ = "read"
    ADMIN = "admin"


class OutputFormat(StrEnum):
    """Encoding of an image."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"


class OnError(StrEnum):
    """Effect of an invalid row of a file."""

    REJECT = "reject"  #: nothing is created
    SKIP = "skip"  #: the valid rows run


class Expand(StrEnum):
    """Combination of the choices of one row."""

    PRODUCT = "product"  #: each with each
    ZIP = "zip"  #: the first with the first, the second with the second
