"""Jobs, as HTTP shows them: to their tenant, to an operator, and in an event."""

from datetime import datetime
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from api.schemas.common import Moment, Page
from api.schemas.job_parts import (
    Image,
    JobError,
    JobUrls,
    Microbatch,
    QueuePosition,
    ResolvedJobInput,
    StepProgress,
    Timings,
)
from darkroom.db import tables
from darkroom.events.feed import FeedEvent
from darkroom.jobs.progress import Steps
from darkroom.status import Status
from darkroom.storage.images import ImageStore


class Job(BaseModel):
    """One prompt, one image."""

    model_config = ConfigDict(protected_namespaces=())

    id: str = Field(description="`job_…`; ids sort by submission time.")
    object: Literal["job"] = "job"
    status: Status = Field(
        description="`succeeded`, `failed`, `canceled` and `expired` are final; a running job may "
        "be queued again."
    )
    model: str = Field(description="Name of the model.")
    input: ResolvedJobInput
    label: str | None = Field(description="Your own label, usable as a list filter.")
    metadata: dict[str, str] = Field(description="Your own pairs of strings.")
    batch_id: str | None = Field(description="Batch of the job. Null for a single job.")
    row_number: int | None = Field(description="Row of the batch's file, from 1.")
    custom_id: str | None = Field(description="Your own id from the row, unique in its file.")
    queue: QueuePosition | None = Field(description="Position and ETA. Null unless queued.")
    progress: StepProgress | None = Field(description="Denoise steps. Null unless running.")
    image: Image | None = Field(description="The image. Null unless succeeded.")
    error: JobError | None = Field(description="Why the job failed. Null unless failed.")
    attempt: int = Field(description="Starts so far, except those undone by faults of the server.")
    retried_from: str | None = Field(description="Job that this one retries.")
    microbatch: Microbatch | None = Field(description="Null until the job has run.")
    timings: Timings
    created_at: Moment = Field(description="When the job was submitted.")
    started_at: Moment | None = Field(description="When the last attempt started.")
    finished_at: Moment | None = Field(description="When the job reached a final status.")
    expires_at: Moment | None = Field(
        description="When the job expires: unless started by then while queued, unless finished by "
        "then while running. Null without a deadline."
    )
    urls: JobUrls

    @classmethod
    def of(
        cls,
        job: tables.Job,
        *,
        queue: QueuePosition | None,
        steps: Steps | None,
        store: ImageStore,
        url_ttl_s: int,
    ) -> Self:
        """Render a job for its tenant; `steps` are those of a running job."""
        return cls(
            id=job.id,
            status=Status(job.status),
            model=job.model,
            input=ResolvedJobInput.of(job),
            label=job.label,
            metadata=job.metadata_,
            batch_id=job.batch_id,
            row_number=job.row_number,
            custom_id=job.custom_id,
            queue=queue,
            progress=StepProgress.of(job, steps),
            image=Image.of(job, store, url_ttl_s),
            error=_error(job),
            attempt=job.attempt,
            retried_from=job.retried_from,
            microbatch=Microbatch.of(job),
            timings=Timings.of(job),
            created_at=job.created_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
            expires_at=_expires_at(job),
            urls=JobUrls.of(job.id),
        )


def _expires_at(job: tables.Job) -> datetime | None:
    if job.status == Status.QUEUED:
        return job.expires_at
    return job.deadline_at if job.status == Status.RUNNING else None


def _error(job: tables.Job | FeedEvent) -> JobError | None:
    return JobError.of(job.error_code, job.error_message, retryable=job.error_retryable)


class JobList(Page[Job]):
    """Jobs of a page."""


class FailedJob(BaseModel):
    """Failed job of any tenant. Excludes the prompt and all other input."""

    model_config = ConfigDict(protected_namespaces=())

    id: str = Field(description="`job_…`.")
    object: Literal["failed_job"] = "failed_job"
    tenant_id: str = Field(description="Owner of the job.")
    batch_id: str | None = Field(description="Batch of the job. Null for a single job.")
    model: str = Field(description="Name of the model.")
    microbatch_key: str = Field(description="What the jobs of its microbatch have in common.")
    attempt: int = Field(description="Starts, except those undone by faults of the server.")
    error: JobError
    created_at: Moment = Field(description="When the job was submitted.")
    finished_at: Moment = Field(description="When the job failed.")

    @classmethod
    def of(cls, job: tables.Job) -> Self:
        """Render a failed job for an operator."""
        error = _error(job)
        assert job.finished_at is not None  # the CHECK finished_iff_terminal
        assert error is not None  # the CHECK error_code_iff
        return cls(
            id=job.id,
            tenant_id=job.tenant_id,
            batch_id=job.batch_id,
            model=job.model,
            microbatch_key=job.microbatch_key,
            attempt=job.attempt,
            error=error,
            created_at=job.created_at,
            finished_at=job.finished_at,
        )


class FailedJobList(Page[FailedJob]):
    """Failed jobs of a page."""


class JobEventData(BaseModel):
    """Job of an event, with its status and error from that event on."""

    id: str = Field(description="`job_…`.")
    object: Literal["job"] = "job"
    status: Status = Field(description="Status from this event on.")
    batch_id: str | None = Field(description="Batch of the job. Null for a single job.")
    row_number: int | None = Field(description="Row of the batch's file, from 1.")
    custom_id: str | None = Field(description="Your own id from the row.")
    error: JobError | None = Field(description="Why the job failed. Null unless failed.")
    urls: JobUrls

    @classmethod
    def of(cls, event: FeedEvent) -> Self:
        """Render the job of a job's event."""
        assert event.job_id is not None
        assert event.status is not None  # both because it is a job's event
        return cls(
            id=event.job_id,
            status=event.status,
            batch_id=event.batch_id,
            row_number=event.row_number,
            custom_id=event.custom_id,
            error=_error(event) if event.status is Status.FAILED else None,
            urls=JobUrls.of(event.job_id),
        )
