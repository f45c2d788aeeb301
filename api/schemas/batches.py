"""Batches."""

from typing import Literal, Self

from pydantic import BaseModel

from api.schemas.common import Moment, ProblemItem, _eta
from darkroom.batches import Counts
from darkroom.db.tables import Batch
from darkroom.forecast.eta import Eta
from darkroom.imports.importer import ImportSummary
from darkroom.status import BatchOutcome, BatchStatus


class CountsView(BaseModel):
    """Jobs by status; they always sum to `total`. `rejected` rows never became jobs."""

    total: int
    rejected: int
    queued: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    canceled: int = 0
    expired: int = 0

    @classmethod
    def of(cls, counts: Counts) -> Self:
        """The counts as clients see them."""
        by_status = {status.value: number for status, number in counts.by_status.items()}
        return cls(total=counts.total, rejected=counts.rejected, **by_status)


class BatchUrls(BaseModel):
    """Where to ask for more."""

    self: str
    events: str
    jobs: str
    errors: str
    manifest: str
    images: str
    cancel: str
    pause: str
    resume: str
    retry: str

    @classmethod
    def of(cls, batch_id: str) -> Self:
        """Paths on this API."""
        path = f"/v1/batches/{batch_id}"
        return cls(
            self=path,
            events=f"{path}/events",
            jobs=f"/v1/jobs?batch_id={batch_id}&limit=100",
            errors=f"{path}/errors.csv",
            manifest=f"{path}/manifest.jsonl",
            images=f"{path}/images.zip",
            cancel=f"{path}/cancel",
            pause=f"{path}/pause",
            resume=f"{path}/resume",
            retry=f"{path}/retry",
        )


class BatchView(BaseModel):
    """A submission of many jobs.

    `eta_s_p50` and `eta_s_p90` are those of its last job: in half of all cases, and in nine of ten,
    all of the batch has ended by then. Null as for a job, and once the batch has ended.
    """

    id: str
    object: Literal["batch"] = "batch"
    status: BatchStatus
    outcome: BatchOutcome | None
    label: str | None
    counts: CountsView
    created_at: Moment
    finished_at: Moment | None
    eta_s_p50: float | None
    eta_s_p90: float | None
    retried_from: str | None
    retention_days: int | None
    deleted_at: Moment | None
    urls: BatchUrls

    @classmethod
    def of(cls, batch: Batch, counts: Counts, eta: Eta | None = None) -> Self:
        """The batch as clients see it. `eta`: of its last job."""
        return cls(
            id=batch.id,
            status=counts.status,
            outcome=counts.outcome,
            label=batch.label,
            counts=CountsView.of(counts),
            created_at=batch.created_at,
            finished_at=batch.finished_at,
            **_eta(eta),
            retried_from=batch.retried_from,
            retention_days=batch.retention_days,
            deleted_at=batch.deleted_at,
            urls=BatchUrls.of(batch.id),
        )


class DryRunCounts(BaseModel):
    """Rows of the file, and the jobs (one image each) that its good rows make."""

    rows: int
    accepted: int
    rejected: int
    total: int


class DryRunView(BaseModel):
    """What would become of a file of rows; nothing was created."""

    object: Literal["dry_run"] = "dry_run"
    counts: DryRunCounts
    eta_s_p50: float | None
    eta_s_p90: float | None
    errors: list[ProblemItem]
    error_count: int

    @classmethod
    def of(cls, tally: ImportSummary, eta: Eta | None) -> Self:
        """The tally as clients see it. `eta`: of all these jobs, were they submitted now."""
        return cls(
            counts=DryRunCounts(
                rows=tally.rows,
                accepted=tally.rows - tally.rejected,
                rejected=tally.rejected,
                total=tally.jobs,
            ),
            **_eta(eta),
            errors=[ProblemItem.of(found) for found in tally.problems],
            error_count=tally.problem_count,
        )
