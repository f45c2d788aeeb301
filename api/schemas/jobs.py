"""Jobs."""

from datetime import UTC, datetime, timedelta
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from api.schemas.common import Moment, _eta
from darkroom.db.tables import Job
from darkroom.forecast.eta import Forecast
from darkroom.forecast.snapshot import QueueSnapshot
from darkroom.generation.image_codec import CONTENT_TYPES
from darkroom.generation.params import GenerationParams
from darkroom.jobs.progress import Steps
from darkroom.status import OutputFormat, Priority, Status
from darkroom.storage.images import ImageStore


class JobInputView(GenerationParams):
    """What the job draws, with every default and the seed filled in."""

    priority: Priority


class QueuePosition(BaseModel):
    """A job's place in the queue, while it waits, and how long it will take until its end.

    `position` 1 is next. It is exact up to 1,000, by and large behind; up to 5 seconds old in
    an answer to a POST and in lists. Half of all jobs are done within `eta_s_p50` seconds, nine of
    ten within `eta_s_p90`; both are null until something has been drawn whose rate can be
    measured, and while the queue or the batch is paused. `will_meet_deadline` is false when half of
    all jobs in this place would miss `start_within_s` or `deadline_s`, and null where there is
    nothing to say.
    """

    position: int | None
    eta_s_p50: float | None
    eta_s_p90: float | None
    will_meet_deadline: bool | None

    @classmethod
    def of(cls, job: Job, look: QueueSnapshot | None, position: int | None = None) -> Self | None:
        """Of a job that waits; `position`: where it is known better than from the look."""
        if job.status != Status.QUEUED:
            return None
        if look is None:
            return cls(position=position, eta_s_p50=None, eta_s_p90=None, will_meet_deadline=None)
        found = look.ask(job)
        return cls(
            position=position or found.position,
            **_eta(found.eta),
            will_meet_deadline=_will_meet_deadline(job, found),
        )


def _will_meet_deadline(job: Job, found: Forecast) -> bool | None:
    if found.eta is None or found.starts_in_s is None or job.expires_at is None:
        return None
    now = datetime.now(UTC)
    begun = found.starts_in_s <= (job.expires_at - now).total_seconds()
    if job.deadline_at is None:
        return begun
    return begun and found.eta.p50_s <= (job.deadline_at - now).total_seconds()


class StepProgress(BaseModel):
    """Denoise steps, while running. `step` is null where it is not known."""

    step: int | None
    steps: int


class ImageView(BaseModel):
    """The finished picture. The URL works without a key until `url_expires_at`."""

    url: str
    url_expires_at: Moment
    sha256: str
    width: int
    height: int
    content_type: str
    bytes: int


class ErrorView(BaseModel):
    """Why a job failed. `retryable`: the same job may succeed another time."""

    code: str
    message: str
    retryable: bool


class MicrobatchView(BaseModel):
    """The company a job was drawn in, and what they had to have in common."""

    size: int
    key: str


class Timings(BaseModel):
    """Milliseconds: waiting for a worker, drawing, storing."""

    queued_ms: int | None
    inference_ms: int | None
    upload_ms: int | None


class JobUrls(BaseModel):
    """Where to ask for more, and where to withdraw it."""

    self: str
    events: str
    image: str
    cancel: str

    @classmethod
    def of(cls, job_id: str) -> Self:
        """Paths on this API."""
        path = f"/v1/jobs/{job_id}"
        return cls(
            self=path, events=f"{path}/events", image=f"{path}/image", cancel=f"{path}/cancel"
        )


class JobView(BaseModel):
    """One prompt, one image."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["job"] = "job"
    status: Status
    model: str
    input: JobInputView
    label: str | None
    metadata: dict[str, str]
    batch_id: str | None
    row_number: int | None
    custom_id: str | None
    queue: QueuePosition | None
    progress: StepProgress | None
    image: ImageView | None
    error: ErrorView | None
    attempt: int
    retried_from: str | None
    microbatch: MicrobatchView | None
    timings: Timings
    created_at: Moment
    started_at: Moment | None
    finished_at: Moment | None
    expires_at: Moment | None
    urls: JobUrls

    @classmethod
    def of(
        cls,
        job: Job,
        *,
        queue: QueuePosition | None,
        steps: Steps | None,
        store: ImageStore,
        url_ttl_s: int,
    ) -> Self:
        """The job as clients see it; its image gets a fresh URL. `steps`: of a job that runs."""
        return cls(
            id=job.id,
            status=Status(job.status),
            model=job.model,
            input=JobInputView(
                **GenerationParams.model_validate(job).model_dump(),
                priority=Priority.from_rank(job.priority),
            ),
            label=job.label,
            metadata=job.metadata_,
            batch_id=job.batch_id,
            row_number=job.row_number,
            custom_id=job.custom_id,
            queue=queue,
            progress=_progress(job, steps),
            image=_image(job, store, url_ttl_s),
            error=_error(job),
            attempt=job.attempt,
            retried_from=job.retried_from,
            microbatch=_microbatch(job),
            timings=_timings(job),
            created_at=job.created_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
            expires_at=_expires_at(job),
            urls=JobUrls.of(job.id),
        )


def _progress(job: Job, known: Steps | None) -> StepProgress | None:
    if job.status != Status.RUNNING:
        return None
    step, steps = known or (None, job.num_inference_steps)
    return StepProgress(step=step, steps=steps)


def _expires_at(job: Job) -> datetime | None:
    """When it will expire, should it not have got further by then."""
    if job.status == Status.QUEUED:
        return job.expires_at
    return job.deadline_at if job.status == Status.RUNNING else None


def _image(job: Job, store: ImageStore, url_ttl_s: int) -> ImageView | None:
    if job.image_key is None or job.image_sha256 is None or job.image_bytes is None:
        return None
    return ImageView(
        url=store.presign(job.image_key, ttl_s=url_ttl_s),
        url_expires_at=datetime.now(UTC) + timedelta(seconds=url_ttl_s),
        sha256=job.image_sha256,
        width=job.width,
        height=job.height,
        content_type=CONTENT_TYPES[OutputFormat(job.output_format)],
        bytes=job.image_bytes,
    )


def _error(job: Job) -> ErrorView | None:
    if job.error_code is None or job.error_message is None:
        return None
    return ErrorView(
        code=job.error_code, message=job.error_message, retryable=bool(job.error_retryable)
    )


def _microbatch(job: Job) -> MicrobatchView | None:
    if job.microbatch_size is None:
        return None
    return MicrobatchView(size=job.microbatch_size, key=job.microbatch_key)


def _timings(job: Job) -> Timings:
    queued = None if job.started_at is None else job.started_at - job.created_at
    return Timings(
        queued_ms=None if queued is None else round(queued.total_seconds() * 1000),
        inference_ms=job.inference_ms,
        upload_ms=job.upload_ms,
    )
