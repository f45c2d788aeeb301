"""/v1/deliveries: the log of webhook deliveries, and replays."""

from collections.abc import Sequence
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Literal, Self

from fastapi import APIRouter, Path, Query
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from api.dependencies import Deps, TenantId
from api.errors import documented
from api.parameters import Limit
from api.schemas.common import Moment, Page
from darkroom.db import webhook_tables
from darkroom.event_types import EventType
from darkroom.status import DeliveryStatus
from darkroom.webhooks import delivery_log
from darkroom.webhooks.deliveries import AttemptOutcome
from darkroom.webhooks.delivery_log import DeliveryFilter

router = APIRouter(prefix="/v1/deliveries", tags=["webhooks"])

DeliveryId = Annotated[str, Path(description="`id` of a delivery.")]
DeliveryCursor = Annotated[
    str | None,
    Query(
        pattern=r"^dlv_[0-9a-f]{32}$",
        description="`next_cursor` of the page before. Default: the first page.",
    ),
]
StatusFilter = Annotated[
    DeliveryStatus | None, Query(description="List only deliveries with this status. Default: all.")
]


class WebhookDeliveryAttempt(BaseModel):
    """One POST and its outcome; the response itself is not stored."""

    outcome: AttemptOutcome = Field(description="How the attempt ended.")
    at: datetime = Field(description="When the attempt ended, to the second.")


class WebhookDelivery(BaseModel):
    """One message to one URL with all its attempts."""

    id: str = Field(description="`dlv_…`.")
    object: Literal["delivery"] = "delivery"
    type: EventType = Field(description="Type of the event.")
    status: DeliveryStatus = Field(
        description="`pending`, `sending`, `accepted` (the receiver answered 2xx), or `exhausted` "
        "(no attempt is left; it can be replayed)."
    )
    message_id: str = Field(description="The header `webhook-id`, the same in every attempt.")
    webhook_id: str | None = Field(description="Endpoint; null for the URL of a job or batch.")
    job_id: str | None = Field(description="Job of the event; null for batches and lists.")
    batch_id: str | None = Field(description="Batch of the event, or of its job.")
    events: int = Field(description="Events in the message: 1, or up to 100 of a large batch.")
    attempts: list[WebhookDeliveryAttempt] = Field(description="Attempts so far, in order.")
    next_attempt_at: Moment | None = Field(description="Null unless the status is `pending`.")
    created_at: Moment = Field(description="When the event happened.")
    finished_at: Moment | None = Field(description="When it was accepted or exhausted.")

    @classmethod
    def of(
        cls,
        delivery: webhook_tables.Delivery,
        attempts: Sequence[webhook_tables.DeliveryAttempt],
    ) -> Self:
        """Render a delivery with its attempts."""
        pending = delivery.status == DeliveryStatus.PENDING
        return cls(
            id=delivery.id,
            type=EventType(delivery.type),
            status=DeliveryStatus(delivery.status),
            message_id=delivery.message_id,
            webhook_id=delivery.endpoint_id,
            job_id=delivery.job_id,
            batch_id=delivery.batch_id,
            events=len(delivery.event_ids),
            attempts=[
                WebhookDeliveryAttempt(
                    outcome=AttemptOutcome(each.outcome), at=each.at.replace(microsecond=0)
                )
                for each in attempts
            ],
            next_attempt_at=delivery.next_attempt_at if pending else None,
            created_at=delivery.created_at,
            finished_at=delivery.finished_at,
        )


class WebhookDeliveryList(Page[WebhookDelivery]):
    """Deliveries, newest first."""


class ReplayRequest(BaseModel):
    """Selection of exhausted deliveries to send again."""

    model_config = ConfigDict(extra="forbid")

    since: AwareDatetime = Field(
        description="RFC 3339 time with offset; deliveries exhausted before are not sent again."
    )
    webhook_id: str | None = Field(
        None, description="Only deliveries of this endpoint. Default: of all endpoints and URLs."
    )


class ReplayResult(BaseModel):
    """Number of deliveries that are sent again."""

    object: Literal["replay"] = "replay"
    replayed: int = Field(description="Deliveries that are due again.")


def render(session: Session, found: Sequence[webhook_tables.Delivery]) -> list[WebhookDelivery]:
    """Render deliveries with their attempts."""
    attempts = delivery_log.attempts(session, found)
    return [WebhookDelivery.of(delivery, attempts[delivery.id]) for delivery in found]


def delivery_page(
    session: Session, tenant_id: str, filters: DeliveryFilter, *, limit: int, cursor: str | None
) -> WebhookDeliveryList:
    """Render one page of the deliveries that match."""
    found = delivery_log.page(session, tenant_id, filters, limit=limit + 1, after=cursor)
    data = render(session, found[:limit])
    return WebhookDeliveryList(data=data, next_cursor=data[-1].id if len(found) > limit else None)


@router.get("", summary="List deliveries", responses=documented(HTTPStatus.UNPROCESSABLE_ENTITY))
def list_deliveries(
    tenant_id: TenantId,
    deps: Deps,
    webhook_id: Annotated[
        str | None,
        Query(pattern=r"^whk_[0-9a-f]{32}$", description="List only deliveries to this endpoint."),
    ] = None,
    job_id: Annotated[
        str | None,
        Query(
            pattern=r"^job_[0-9a-f]{32}$",
            description="List only deliveries with events of this job.",
        ),
    ] = None,
    batch_id: Annotated[
        str | None,
        Query(
            pattern=r"^bat_[0-9a-f]{32}$",
            description="List only deliveries with events of this batch and its jobs.",
        ),
    ] = None,
    status: StatusFilter = None,
    limit: Limit = 20,
    cursor: DeliveryCursor = None,
) -> WebhookDeliveryList:
    """Return deliveries to endpoints and to the URLs of jobs and batches, newest first."""
    filters = DeliveryFilter(webhook_id, job_id=job_id, batch_id=batch_id, status=status)
    with deps.sessions.begin() as session:
        return delivery_page(session, tenant_id, filters, limit=limit, cursor=cursor)


@router.get("/{delivery_id}", summary="Get a delivery", responses=documented(HTTPStatus.NOT_FOUND))
def get_delivery(delivery_id: DeliveryId, tenant_id: TenantId, deps: Deps) -> WebhookDelivery:
    """Return a delivery with its attempts."""
    with deps.sessions.begin() as session:
        return render(session, [delivery_log.find(session, tenant_id, delivery_id)])[0]


@router.post(
    "/{delivery_id}/replay",
    summary="Replay a delivery",
    status_code=HTTPStatus.ACCEPTED,
    responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
)
def replay_delivery(delivery_id: DeliveryId, tenant_id: TenantId, deps: Deps) -> WebhookDelivery:
    """Send a delivery again with the same `webhook-id`, whatever its status."""
    with deps.sessions.begin() as session:
        delivery = render(session, [delivery_log.replay(session, tenant_id, delivery_id)])[0]
    deps.notifier.notify_webhook_senders()
    return delivery


@router.post(
    "/replay",
    summary="Replay exhausted deliveries",
    status_code=HTTPStatus.ACCEPTED,
    responses=documented(HTTPStatus.UNPROCESSABLE_ENTITY),
)
def replay_deliveries(asked: ReplayRequest, tenant_id: TenantId, deps: Deps) -> ReplayResult:
    """Send deliveries exhausted since a time again, each with its old `webhook-id`."""
    with deps.sessions.begin() as session:
        count = delivery_log.replay_failed(
            session, tenant_id, since=asked.since, endpoint_id=asked.webhook_id
        )
    deps.notifier.notify_webhook_senders()
    return ReplayResult(replayed=count)
