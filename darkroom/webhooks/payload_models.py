"""Models of webhook payloads: the JSON that is sent, and its schemas in the OpenAPI document."""

from datetime import datetime
from typing import Annotated, Final, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer

from darkroom.event_types import EventType
from darkroom.rfc3339 import rfc3339
from darkroom.status import BatchOutcome, BatchStatus, Status

Moment: TypeAlias = Annotated[datetime, PlainSerializer(rfc3339, return_type=str)]
JobEvent: TypeAlias = Literal[
    EventType.JOB_STARTED,
    EventType.JOB_SUCCEEDED,
    EventType.JOB_FAILED,
    EventType.JOB_CANCELED,
    EventType.JOB_EXPIRED,
]
BatchEvent: TypeAlias = Literal[EventType.BATCH_COMPLETED, EventType.BATCH_CANCELED]
EndpointEvent: TypeAlias = Literal[EventType.WEBHOOK_TEST, EventType.WEBHOOK_DISABLED]


class _Payload(BaseModel):
    model_config = ConfigDict(extra="forbid")


class JobEventError(_Payload):
    """Reason of a job's failure."""

    code: str = Field(description="Error code; the same as in the job resource.")
    message: str = Field(description="Error message, cut after 500 characters.")
    retryable: bool = Field(description="Whether a retry of the job may succeed.")


class JobEventListError(_Payload):
    """Reason of the failure of one job of a list."""

    code: str = Field(description="Error code; the same as in the job resource.")
    retryable: bool = Field(description="Whether a retry of the job may succeed.")


class JobEventUrls(_Payload):
    """Paths of a job on this API."""

    self: str = Field(description="The job.")
    image: str = Field(description="Redirects to a fresh URL of the image of a succeeded job.")


class _JobIdentity(_Payload):
    id: str = Field(description="`job_…`.")
    object: Literal["job"]
    status: Status = Field(description="Status of the job right after the event.")
    row_number: int | None = Field(description="Row of the uploaded file, from 1; null without.")
    image_number: int | None = Field(description="Image of that row, from 1; null without.")
    custom_id: str | None = Field(
        description="The client's id; null where it is longer than 1024 bytes (64 in a list)."
    )


class WebhookJob(_JobIdentity):
    """Job as it was right after the event."""

    batch_id: str | None = Field(description="Batch of the job; null without.")
    label: str | None = Field(description="The client's label; null without.")
    attempt: int | None = Field(description="Attempts at generating the image so far.")
    error: JobEventError | None = Field(description="Null unless the event is `job.failed`.")
    created_at: Moment | None = Field(description="When the job was submitted.")
    urls: JobEventUrls


class JobEventListItem(_JobIdentity):
    """Job of a list, as it was right after the event."""

    error: JobEventListError | None = Field(description="Null unless the event is `job.failed`.")


class JobEventList(_Payload):
    """Up to 100 jobs of one batch of more than 5,000 jobs, with the same event."""

    object: Literal["list"]
    batch_id: str = Field(description="Batch of the jobs.")
    data: list[JobEventListItem] = Field(description="The jobs, in the order of their events.")


class BatchEventCounts(_Payload):
    """Jobs by status, which sum to `total`; `rejected` rows never became jobs."""

    total: int = Field(description="Jobs of the batch.")
    rejected: int = Field(description="Rows of the file that were rejected.")
    queued: int = Field(description="Jobs with this status.")
    running: int = Field(description="Jobs with this status.")
    succeeded: int = Field(description="Jobs with this status.")
    failed: int = Field(description="Jobs with this status.")
    canceled: int = Field(description="Jobs with this status.")
    expired: int = Field(description="Jobs with this status.")


class BatchEventUrls(_Payload):
    """Paths of a batch on this API."""

    self: str = Field(description="The batch.")
    jobs: str = Field(description="Its jobs, in pages of 100.")


class WebhookBatch(_Payload):
    """Batch with its counts at the time of the attempt."""

    id: str = Field(description="`bat_…`.")
    object: Literal["batch"]
    status: BatchStatus = Field(description="Status of the batch.")
    outcome: BatchOutcome | None = Field(description="Null unless the status is `completed`.")
    label: str | None = Field(description="The client's label; null without.")
    counts: BatchEventCounts
    created_at: Moment = Field(description="When the batch was submitted.")
    finished_at: Moment | None = Field(description="When its last job finished; null before.")
    urls: BatchEventUrls


class EndpointEventData(_Payload):
    """Webhook endpoint that is tested or was disabled."""

    id: str = Field(description="`whk_…`.")
    object: Literal["webhook"]
    reason: str | None = Field(
        description="`gone` (it answered 410) or `failing` (for five days); null in a test."
    )


class JobMessage(_Payload):
    """Event of one job, or the same event of several jobs of a large batch."""

    type: JobEvent = Field(description="What happened.")
    timestamp: Moment = Field(description="When it happened.")
    data: Annotated[WebhookJob | JobEventList, Field(discriminator="object")] = Field(
        description="The job, or a list of jobs."
    )


class BatchMessage(_Payload):
    """Event of a batch."""

    type: BatchEvent = Field(description="What happened.")
    timestamp: Moment = Field(description="When it happened.")
    data: WebhookBatch


class EndpointMessage(_Payload):
    """Test event, or the news that another endpoint of the tenant was disabled."""

    type: EndpointEvent = Field(description="What happened.")
    timestamp: Moment = Field(description="When it happened.")
    data: EndpointEventData


Message: TypeAlias = JobMessage | BatchMessage | EndpointMessage
MESSAGES: Final[dict[EventType, type[Message]]] = {
    **dict.fromkeys(get_args(JobEvent), JobMessage),
    **dict.fromkeys(get_args(BatchEvent), BatchMessage),
    **dict.fromkeys(get_args(EndpointEvent), EndpointMessage),
}
