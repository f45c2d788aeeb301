"""Parts of a job: its input, its queue position, its image, its error, its timings."""

from datetime import UTC, datetime, timedelta
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from api.schemas.common import ETA_P50, ETA_P90, Moment, eta_fields
from darkroom.db import tables
from darkroom.forecast.eta import Forecast
from darkroom.forecast.snapshot import QueueSnapshot
from darkroom.generation.image_codec import CONTENT_TYPES
from darkroom.jobs.progress import Steps
from darkroom.status import OutputFormat, Priority, Status
from darkroom.storage.images import ImageStore


class ResolvedJobInput(BaseModel):
    """Input of a job with every default and the seed filled in."""

    model_config = ConfigDict(protected_namespaces=(), from_attributes=True)

    prompt: str = Field(description="What to generate. Empty once the job is deleted.")
    negative_prompt: str = Field(description="What to keep out of the image.")
    model: str = Field(description="Name of the model.")
    width: int = Field(description="Pixels.")
    height: int = Field(description="Pixels.")
    num_inference_steps: int = Field(description="Denoise steps.")
    guidance_scale: float = Field(
        description="Classifier-free guidance; off at 1 or less, which costs half."
    )
    seed: int = Field(description="The same seed and parameters give the same image.")
    output_format: OutputFormat = Field(description="Encoding of the image.")
    priority: Priority = Field(description="Service class in the queue.")

    @classmethod
    def of(cls, job: tables.Job) -> Self:
        """Render the input of a job."""
        names = cls.model_fields.keys() - {"priority"}
        priority = Priority.from_rank(job.priority)
        return cls(**{name: getattr(job, name) for name in names}, priority=priority)


class QueuePosition(BaseModel):
    """Place of a queued job, and the time until its end.

    The ETAs are null until a generation rate has been measured, and while the queue or the batch is
    paused.
    """

    position: int | None = Field(
        description="1 is next. Exact up to 1,000, approximate behind; up to 5 seconds old in "
        "lists and in the response to a POST."
    )
    eta_s_p50: float | None = Field(description=ETA_P50)
    eta_s_p90: float | None = Field(description=ETA_P90)
    will_meet_deadline: bool | None = Field(
        description="False when half of all jobs at this position would miss `start_within_s` or "
        "`deadline_s`. Null without a deadline or an ETA."
    )

    @classmethod
    def of(
        cls, job: tables.Job, snapshot: QueueSnapshot | None, position: int | None = None
    ) -> Self | None:
        """Render the position of a queued job; `position` replaces the snapshot's, if given."""
        if job.status != Status.QUEUED:
            return None
        if snapshot is None:
            return cls(position=position, eta_s_p50=None, eta_s_p90=None, will_meet_deadline=None)
        forecast = snapshot.ask(job)
        return cls(
            position=position or forecast.position,
            **eta_fields(forecast.eta),
            will_meet_deadline=_will_meet_deadline(job, forecast),
        )


def _will_meet_deadline(job: tables.Job, forecast: Forecast) -> bool | None:
    if forecast.eta is None or forecast.starts_in_s is None or job.expires_at is None:
        return None
    now = datetime.now(UTC)
    in_time = forecast.starts_in_s <= (job.expires_at - now).total_seconds()
    if job.deadline_at is None:
        return in_time
    return in_time and forecast.eta.p50_s <= (job.deadline_at - now).total_seconds()


class StepProgress(BaseModel):
    """Denoise steps of a running job."""

    step: int | None = Field(description="Steps done. Null while unknown.")
    steps: int = Field(description="Steps in all.")

    @classmethod
    def of(cls, job: tables.Job, known: Steps | None) -> Self | None:
        """Render the progress of a running job."""
        if job.status != Status.RUNNING:
            return None
        step, steps = known or (None, job.num_inference_steps)
        return cls(step=step, steps=steps)


class Image(BaseModel):
    """The finished image."""

    url: str = Field(description="Presigned URL: works without a key until `url_expires_at`.")
    url_expires_at: Moment = Field(description="When the URL stops working; GET the job again.")
    sha256: str = Field(description="SHA-256 of the file, in hex.")
    width: int = Field(description="Pixels.")
    height: int = Field(description="Pixels.")
    content_type: str = Field(description="Media type of the file.")
    bytes: int = Field(description="Size of the file.")

    @classmethod
    def of(cls, job: tables.Job, store: ImageStore, url_ttl_s: int) -> Self | None:
        """Render the image of a job with a fresh URL."""
        if job.image_key is None or job.image_sha256 is None or job.image_bytes is None:
            return None
        return cls(
            url=store.presign(job.image_key, ttl_s=url_ttl_s),
            url_expires_at=datetime.now(UTC) + timedelta(seconds=url_ttl_s),
            sha256=job.image_sha256,
            width=job.width,
            height=job.height,
            content_type=CONTENT_TYPES[OutputFormat(job.output_format)],
            bytes=job.image_bytes,
        )


class JobError(BaseModel):
    """Reason why a job failed."""

    code: str = Field(description="Stable name of the reason, in snake_case.")
    message: str = Field(description="What happened, for people.")
    retryable: bool = Field(description="Whether the same job may succeed when it is retried.")

    @classmethod
    def of(cls, code: str | None, message: str | None, *, retryable: bool | None) -> Self | None:
        """Render the error columns of a job; None for a job that has not failed."""
        if code is None:
            return None
        return cls(code=code, message=message or "", retryable=bool(retryable))


class Microbatch(BaseModel):
    """Microbatch in which the job was generated."""

    size: int = Field(description="Jobs that ran together.")
    key: str = Field(description="What the jobs of a microbatch have in common.")

    @classmethod
    def of(cls, job: tables.Job) -> Self | None:
        """Render the microbatch of a job that has run."""
        if job.microbatch_size is None:
            return None
        return cls(size=job.microbatch_size, key=job.microbatch_key)


class Timings(BaseModel):
    """Duration of each stage. A stage that has not finished is null."""

    queued_ms: int | None = Field(description="Milliseconds from submission to the last start.")
    inference_ms: int | None = Field(description="Milliseconds of generation.")
    upload_ms: int | None = Field(description="Milliseconds of storing the image.")

    @classmethod
    def of(cls, job: tables.Job) -> Self:
        """Render the timings of a job."""
        queued = None if job.started_at is None else job.started_at - job.created_at
        return cls(
            queued_ms=None if queued is None else round(queued.total_seconds() * 1000),
            inference_ms=job.inference_ms,
            upload_ms=job.upload_ms,
        )


class JobUrls(BaseModel):
    """Paths of the job on this API."""

    self: str = Field(description="The job.")
    events: str = Field(description="Its events, as a stream.")
    image: str = Field(description="Redirect to its image.")
    cancel: str = Field(description="POST here to cancel it.")

    @classmethod
    def of(cls, job_id: str) -> Self:
        """Return the paths of a job."""
        path = f"/v1/jobs/{job_id}"
        return cls(
            self=path, events=f"{path}/events", image=f"{path}/image", cancel=f"{path}/cancel"
        )
