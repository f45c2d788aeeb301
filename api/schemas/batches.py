"""Batches, and the result of a dry run."""

from typing import Literal, Self

from pydantic import BaseModel, Field

from api.schemas.common import ETA_P50, ETA_P90, Moment, Page, ProblemItem, eta_fields
from darkroom.batches import Counts
from darkroom.db import tables
from darkroom.forecast.eta import Eta
from darkroom.imports.importer import ImportSummary
from darkroom.status import BatchOutcome, BatchStatus


class BatchCounts(BaseModel):
    """Jobs of a batch by status; the statuses always sum to `total`."""

    total: int = Field(description="Jobs of the batch.")
    rejected: int = Field(description="Rows that became no job.")
    queued: int = Field(0, description="Jobs that wait.")
    running: int = Field(0, description="Jobs in a worker.")
    succeeded: int = Field(0, description="Jobs with an image.")
    failed: int = Field(0, description="Jobs out of attempts.")
    canceled: int = Field(0, description="Jobs canceled by the client or an operator.")
    expired: int = Field(0, description="Jobs that missed their deadline.")

    @classmethod
    def of(cls, counts: Counts) -> Self:
        """Render the counts of a batch."""
        by_status = {status.value: number for status, number in counts.by_status.items()}
        return cls(total=counts.total, rejected=counts.rejected, **by_status)


class BatchUrls(BaseModel):
    """Paths of the batch on this API."""

    self: str = Field(description="The batch.")
    events: str = Field(description="Its events and those of its jobs, as a stream.")
    jobs: str = Field(description="Its jobs, in the order of its rows.")
    errors: str = Field(description="Its rejected rows, as CSV.")
    manifest: str = Field(description="Its jobs and images, as JSON lines.")
    images: str = Field(description="Its images so far, as a ZIP file.")
    cancel: str = Field(description="POST here to cancel it.")
    pause: str = Field(description="POST here to pause it.")
    resume: str = Field(description="POST here to resume it.")
    retry: str = Field(description="POST here to retry its failed jobs.")

    @classmethod
    def of(cls, batch_id: str) -> Self:
        """Return the paths of a batch."""
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


class Batch(BaseModel):
    """Submission of many jobs. Its ETAs are those of its last job."""

    id: str = Field(description="`bat_…`; ids sort by submission time.")
    object: Literal["batch"] = "batch"
    status: BatchStatus = Field(
        description="`completed` when every job is in a final status; `canceled` from the request "
        "on, though jobs may still run for about a step."
    )
    outcome: BatchOutcome | None = Field(description="Null unless completed.")
    label: str | None = Field(description="Your own label, usable as a list filter.")
    counts: BatchCounts
    created_at: Moment = Field(description="When the batch was submitted.")
    finished_at: Moment | None = Field(description="When its last job reached a final status.")
    eta_s_p50: float | None = Field(description=ETA_P50)
    eta_s_p90: float | None = Field(description=ETA_P90)
    retried_from: str | None = Field(description="Batch whose failed jobs this one retries.")
    retention_days: int | None = Field(
        description="Days until its images and prompts are deleted. Null: the tenant's default."
    )
    deleted_at: Moment | None = Field(description="When its images and prompts were deleted.")
    urls: BatchUrls

    @classmethod
    def of(cls, batch: tables.Batch, counts: Counts, eta: Eta | None = None) -> Self:
        """Render a batch; `eta` is that of its last job."""
        return cls(
            id=batch.id,
            status=counts.status,
            outcome=counts.outcome,
            label=batch.label,
            counts=BatchCounts.of(counts),
            created_at=batch.created_at,
            finished_at=batch.finished_at,
            **eta_fields(eta),
            retried_from=batch.retried_from,
            retention_days=batch.retention_days,
            deleted_at=batch.deleted_at,
            urls=BatchUrls.of(batch.id),
        )


class BatchList(Page[Batch]):
    """Batches of a page."""


class DryRunCounts(BaseModel):
    """Rows of the file, and the jobs that its accepted rows would become."""

    rows: int = Field(description="Rows of the file.")
    accepted: int = Field(description="Rows without a problem.")
    rejected: int = Field(description="Rows with a problem.")
    total: int = Field(description="Jobs, one for each image.")


class DryRun(BaseModel):
    """What a file of rows would become; nothing was created."""

    object: Literal["dry_run"] = "dry_run"
    counts: DryRunCounts
    eta_s_p50: float | None = Field(description=ETA_P50)
    eta_s_p90: float | None = Field(description=ETA_P90)
    errors: list[ProblemItem] = Field(description="The first 10,000 problems of the file.")
    error_count: int = Field(description="Problems of the file.")

    @classmethod
    def of(cls, summary: ImportSummary, eta: Eta | None) -> Self:
        """Render a summary; `eta` is that of all its jobs, if submitted now."""
        return cls(
            counts=DryRunCounts(
                rows=summary.rows,
                accepted=summary.rows - summary.rejected,
                rejected=summary.rejected,
                total=summary.jobs,
            ),
            **eta_fields(eta),
            errors=[ProblemItem.of(found) for found in summary.problems],
            error_count=summary.problem_count,
        )
