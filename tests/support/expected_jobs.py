"""Model in memory of jobs and batches, which the stateful test compares with the rows."""

from dataclasses import dataclass, field

from darkroom.queue.outcomes import Failed, Outcome, Requeued, RequeueReason, Succeeded


@dataclass
class ExpectedBatch:
    """Batch as it must be now."""

    id: str
    jobs: list["ExpectedJob"] = field(default_factory=list)
    paused: bool = False
    canceled: bool = False
    finished: bool = False


@dataclass
class ExpectedJob:
    """Job as it must be now."""

    id: str
    width: int
    batch: ExpectedBatch | None
    has_start: bool
    has_deadline: bool
    status: str = "queued"
    attempt: int = 0
    isolation_group: str = ""
    dispatch: int | None = None
    paused: bool = False
    backing_off: bool = False
    cancel_requested: bool = False
    overdue: bool = False
    ends: int = 0
    deleted: bool = False
    retried_as: str | None = None

    @property
    def claimable(self) -> bool:
        """Whether a worker may claim it now."""
        blocked = self.paused or self.backing_off or (self.overdue and self.expires)
        return self.status == "queued" and not blocked

    @property
    def expires(self) -> bool:
        """Whether it has a time limit for its start."""
        return self.has_start or self.has_deadline

    @property
    def ends_as(self) -> str | None:
        """Status at the end of its dispatch, whatever its outcome; None if it is still wanted."""
        if self.has_deadline and self.overdue:
            return "expired"
        canceled = self.cancel_requested or (self.batch is not None and self.batch.canceled)
        return "canceled" if canceled else None


def outcome_of(job_id: str, dispatch_id: int, kind: str) -> Outcome:
    """Return an outcome of the kind succeeded, failed or requeued."""
    match kind:
        case "succeeded":
            return Succeeded(job_id, f"a/{job_id}/{dispatch_id}.png", "0" * 64, 10, 5, 1)
        case "failed":
            return Failed(job_id, "not_finite", "not a number")
    return Requeued(job_id, RequeueReason.UNAVAILABLE)
