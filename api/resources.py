"""What clients read: jobs, batches and models as the contract words them."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, PlainSerializer

from darkroom.batches import BatchOutcome, BatchStatus, Counts
from darkroom.catalogue import FloatLimits, IntLimits, Model
from darkroom.errors import InputProblem
from darkroom.forecast import Eta, Forecast
from darkroom.imports import Tally
from darkroom.outlook import Look
from darkroom.params import GenerationParams, OutputFormat
from darkroom.pictures import CONTENT_TYPES
from darkroom.progress import Steps
from darkroom.status import Priority, Status
from darkroom.storage import ImageStore
from darkroom.tables import Batch, Job

Item = TypeVar("Item")
#: RFC 3339, UTC, milliseconds
Moment = Annotated[
    datetime,
    PlainSerializer(
        lambda at: at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        return_type=str,
    ),
]


class ProblemItem(BaseModel):
    """One thing wrong with the input, and where."""

    loc: list[str | int]
    code: str
    message: str

    @classmethod
    def of(cls, found: InputProblem) -> Self:
        """The problem as clients see it."""
        return cls(loc=list(found.loc), code=found.code, message=found.message)


class Page(BaseModel, Generic[Item]):
    """Part of a list; ask again with `cursor=next_cursor` for what follows."""

    object: Literal["list"] = "list"
    data: list[Item]
    next_cursor: str | None


class JobInputView(GenerationParams):
    """What the job draws, with every default and the seed filled in."""

    priority: Priority


class QueueView(BaseModel):
    """A job's place in the queue, while it waits, and how long it will take until its end.

    `position` 1 is next. It is exact up to 1,000, by and large behind; up to 5 seconds old in
    an answer to a POST and in lists. Half of all jobs are done within `eta_s_p50` seconds, nine of
    ten within `eta_s_p90`; both are null until something has been drawn whose rate can be
    measured, and while the queue or the batch is paused. `is_possible` is false when half of all
    jobs in this place would miss `start_within_s` or `deadline_s`, and null where there is nothing
    to say.
    """

    position: int | None
    eta_s_p50: float | None
    eta_s_p90: float | None
    is_possible: bool | None

    @classmethod
    def of(cls, job: Job, look: Look | None, position: int | None = None) -> Self | None:
        """Of a job that waits; `position`: where it is known better than from the look."""
        if job.status != Status.QUEUED:
            return None
        if look is None:
            return cls(position=position, eta_s_p50=None, eta_s_p90=None, is_possible=None)
        found = look.ask(job)
        return cls(
            position=position or found.position,
            **_eta(found.eta),
            is_possible=_is_possible(job, found),
        )


def _eta(eta: Eta | None) -> dict[str, float | None]:
    """Tenths of a second are enough."""
    return {
        "eta_s_p50": None if eta is None else round(eta.p50_s, 1),
        "eta_s_p90": None if eta is None else round(eta.p90_s, 1),
    }


def _is_possible(job: Job, found: Forecast) -> bool | None:
    if found.eta is None or found.begins_s is None or job.expires_at is None:
        return None
    now = datetime.now(UTC)
    begun = found.begins_s <= (job.expires_at - now).total_seconds()
    if job.deadline_at is None:
        return begun
    return begun and found.eta.p50_s <= (job.deadline_at - now).total_seconds()


class Progress(BaseModel):
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
    queue: QueueView | None
    progress: Progress | None
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
        queue: QueueView | None,
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
                priority=list(Priority)[job.priority],
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


def _progress(job: Job, known: Steps | None) -> Progress | None:
    if job.status != Status.RUNNING:
        return None
    step, steps = known or (None, job.num_inference_steps)
    return Progress(step=step, steps=steps)


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
    def of(cls, tally: Tally, eta: Eta | None) -> Self:
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


class ModelView(BaseModel):
    """What may be asked of a model, and what it does when not told."""

    model_config = ConfigDict(protected_namespaces=())

    name: str
    object: Literal["model"] = "model"
    revision: str
    revision_of: str | None  #: the model that this is an older revision of
    description: str
    licence: str
    is_default: bool
    scheduler: str
    precision: str
    microbatch_size: int
    width: IntLimits
    height: IntLimits
    num_inference_steps: IntLimits
    guidance_scale: FloatLimits

    @classmethod
    def of(cls, model: Model, *, is_default: bool) -> Self:
        """The model as clients see it."""
        card = model.model_dump(exclude={"max_microbatch", "max_unet_rows", "on_demand"})
        return cls(**card, microbatch_size=model.max_microbatch, is_default=is_default)
