"""What webhooks say, for the OpenAPI document: `darkroom.webhooks.payloads` writes them."""

from datetime import datetime
from typing import Annotated, Final, Literal

from fastapi import APIRouter, Header
from pydantic import BaseModel, ConfigDict, Field

from api.schemas.batches import BatchCounts
from darkroom.event_types import EventType
from darkroom.status import Status

JobEvent = Literal[
    EventType.JOB_STARTED,
    EventType.JOB_SUCCEEDED,
    EventType.JOB_FAILED,
    EventType.JOB_CANCELED,
    EventType.JOB_EXPIRED,
]
BatchEvent = Literal[EventType.BATCH_COMPLETED, EventType.BATCH_CANCELED]
EndpointEvent = Literal[EventType.WEBHOOK_TEST, EventType.WEBHOOK_DISABLED]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class JobEventError(_Closed):
    """Why a job failed; the message in its first 500 characters."""

    code: str
    message: str
    retryable: bool


class JobEventListError(_Closed):
    """Why one of many failed."""

    code: str
    retryable: bool


class JobEventUrls(_Closed):
    """Where there is more; the image's leads to a fresh address of it, once the job succeeded."""

    self: str
    image: str


class _Identity(_Closed):
    id: str
    object: Literal["job"]
    status: Status
    row_number: int | None
    image_number: int | None
    custom_id: str | None


class WebhookJob(_Identity):
    """A job as it was when the event happened."""

    batch_id: str | None
    label: str | None
    attempt: int | None
    error: JobEventError | None
    created_at: datetime | None
    urls: JobEventUrls


class JobEventListItem(_Identity):
    """One job of many in one message."""

    error: JobEventListError | None


class JobEventList(_Closed):
    """Up to a hundred jobs of one batch: only of batches with more than 5,000."""

    object: Literal["list"]
    batch_id: str
    data: list[JobEventListItem]


class BatchEventUrls(_Closed):
    """Where there is more."""

    self: str
    jobs: str


class WebhookBatch(_Closed):
    """A batch with its counts when the webhook was sent."""

    id: str
    object: Literal["batch"]
    status: str
    outcome: str | None
    label: str | None
    counts: BatchCounts
    created_at: datetime
    finished_at: datetime | None
    urls: BatchEventUrls


class EndpointEventData(_Closed):
    """The endpoint that is tried, or that was disabled; `reason`: `gone` (410) or `failing`."""

    id: str
    object: Literal["webhook"]
    reason: str | None


class JobMessage(_Closed):
    """Something happened to a job, or to many of a large batch."""

    type: JobEvent
    timestamp: datetime
    data: Annotated[WebhookJob | JobEventList, Field(discriminator="object")]


class BatchMessage(_Closed):
    """A batch came to its end."""

    type: BatchEvent
    timestamp: datetime
    data: WebhookBatch


class EndpointMessage(_Closed):
    """A test, or another endpoint that is called no more."""

    type: EndpointEvent
    timestamp: datetime
    data: EndpointEventData


MESSAGES: Final = {
    **dict.fromkeys(JobEvent.__args__, JobMessage),  # type: ignore[attr-defined]
    **dict.fromkeys(BatchEvent.__args__, BatchMessage),  # type: ignore[attr-defined]
    **dict.fromkeys(EndpointEvent.__args__, EndpointMessage),  # type: ignore[attr-defined]
}

_Id = Annotated[str, Header(description="Of the message; the same in every attempt and replay.")]
_Timestamp = Annotated[int, Header(description="Of this attempt, in seconds since 1970.")]
_Signature = Annotated[
    str, Header(description="`v1,…` by the shared secret, perhaps `v1a,…` (ed25519); with spaces.")
]


def document(webhooks: APIRouter) -> None:
    """Name every type with its body. Any 2xx accepts; docs/webhooks.md has the rest."""
    for kind, message in MESSAGES.items():

        def told(
            body: message,  # type: ignore[valid-type]
            webhook_id: _Id,
            webhook_timestamp: _Timestamp,
            webhook_signature: _Signature,
        ) -> None:
            """Verify the signature over the raw body, answer 2xx soon, work later."""

        told.__name__ = f"on_{kind.replace('.', '_')}"
        webhooks.post(kind.value, summary=kind.value, tags=["webhooks"])(told)
