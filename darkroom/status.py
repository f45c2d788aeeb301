"""Statuses of jobs, dispatches and deliveries; transitions; priorities."""

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
