"""Events, as the streams send them."""

from typing import Literal, Self

from pydantic import BaseModel, Field

from api.schemas.batches import BatchUrls
from api.schemas.common import Moment
from api.schemas.jobs import JobEventData
from darkroom.event_types import EventType
from darkroom.events.feed import FeedEvent
from darkroom.status import BatchStatus


class BatchEventData(BaseModel):
    """Batch of an event, with its status from that event on."""

    id: str = Field(description="`bat_…`.")
    object: Literal["batch"] = "batch"
    status: BatchStatus = Field(description="Status from this event on.")
    urls: BatchUrls

    @classmethod
    def of(cls, event: FeedEvent) -> Self:
        """Render the batch of a batch's event."""
        assert event.batch_id is not None  # because it is a batch's event
        canceled = event.type is EventType.BATCH_CANCELED
        return cls(
            id=event.batch_id,
            status=BatchStatus.CANCELED if canceled else BatchStatus.COMPLETED,
            urls=BatchUrls.of(event.batch_id),
        )


class Event(BaseModel):
    """Change of status of a job or a batch."""

    id: str = Field(description="`evt_…`; a webhook about the same event has the same id.")
    object: Literal["event"] = "event"
    type: EventType = Field(description="What happened.")
    timestamp: Moment = Field(description="When it happened.")
    data: JobEventData | BatchEventData = Field(description="The job or batch that changed.")

    @classmethod
    def of(cls, event: FeedEvent) -> Self:
        """Render an event."""
        return cls(
            id=event.id,
            type=event.type,
            timestamp=event.created_at,
            data=JobEventData.of(event) if event.status else BatchEventData.of(event),
        )
