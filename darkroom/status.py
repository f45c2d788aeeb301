"""Statuses with their transitions, and every other enum that clients see."""

from enum import StrEnum
from typing import Final


class Status(StrEnum):
    """Where a job is. Public: these are the words clients see."""

    QUEUED = "queued"  #: waiting for a worker; the row itself is the queue entry
    RUNNING = "running"  #: claimed by one dispatch, in one microbatch
    SUCCEEDED = "succeeded"  #: its image is in the store
    FAILED = "failed"  #: it will not be tried again; `error` says why
    CANCELED = "canceled"  #: withdrawn by the client
    EXPIRED = "expired"  #: its deadline passed before it was drawn


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
    """Where a dispatch is: one claim of a microbatch with its lease. Only `running` may write."""

    RUNNING = "running"  #: leased; its worker renews it
    FINISHED = "finished"  #: its results are committed
    EXPIRED = "expired"  #: its worker stopped renewing; its jobs are suspects
    CRASHED = "crashed"  #: its replica died or hung over it; its jobs are suspects
    RELEASED = "released"  #: its worker handed the jobs back, for a fault that was not theirs


class DeliveryStatus(StrEnum):
    """Where a webhook is. Public."""

    PENDING = "pending"  #: waiting for its first or next attempt
    SENDING = "sending"  #: claimed by a sender
    ACCEPTED = "accepted"  #: the receiver answered 2xx
    EXHAUSTED = "exhausted"  #: no attempt is left; it can be replayed


class Priority(StrEnum):
    """Service class of a job, in the order in which they are claimed."""

    INTERACTIVE = "interactive"
    NORMAL = "normal"
    BULK = "bulk"


PRIORITY_RANK: Final = {priority: rank for rank, priority in enumerate(Priority)}


class BatchStatus(StrEnum):
    """Where a batch is; follows from its jobs."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    CANCELED = "canceled"


class BatchOutcome(StrEnum):
    """How a completed batch finished."""

    ALL_SUCCEEDED = "all_succeeded"
    PARTIAL = "partial"
    ALL_FAILED = "all_failed"


class Scope(StrEnum):
    """What an API key may do."""

    SUBMIT = "submit"
    READ = "read"
    ADMIN = "admin"


class OutputFormat(StrEnum):
    """How an image is encoded."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"


class OnError(StrEnum):
    """What an invalid row of a file does."""

    REJECT = "reject"  #: nothing is created
    SKIP = "skip"  #: the valid rows run


class Expand(StrEnum):
    """How the choices of one row are combined."""

    PRODUCT = "product"  #: each with each
    ZIP = "zip"  #: the first with the first, the second with the second
