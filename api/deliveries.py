"""/v1/deliveries: what became of webhooks, and sending them anew."""

from collections.abc import Sequence
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Literal, Self

from fastapi import APIRouter, Query
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from api.dependencies import Deps, TenantId
from api.errors import documented
from api.parameters import Limit
from api.schemas.common import Moment, Page
from darkroom.db.webhook_tables import Delivery, DeliveryAttempt
from darkroom.event_types import EventType
from darkroom.status import DeliveryStatus
from darkroom.webhooks import delivery_log
from darkroom.webhooks.deliveries import AttemptOutcome
from darkroom.webhooks.delivery_log import DeliveryFilter

router = APIRouter(prefix="/v1/deliveries", tags=["webhooks"])

DeliveryCursor = Annotated[str | None, Query(pattern=r"^dlv_[0-9a-f]{32}$")]


class AttemptView(BaseModel):
    """One POST, and in a word how it ended. The answer itself is kept nowhere."""

    outcome: AttemptOutcome
    at: datetime = Field(description="To the second.")


class DeliveryView(BaseModel):
    """One message to one URL. `exhausted`: no attempt is left; it can be replayed."""

    id: str
    object: Literal["delivery"] = "delivery"
    type: EventType
    status: DeliveryStatus
    message_id: str = Field(description="The header `webhook-id`; the same in every attempt.")
    webhook_id: str | None = Field(description="Null for the URL of a single job or batch.")
    job_id: str | None
    batch_id: str | None
    events: int = Field(description="How many it tells of: more than one for large batches only.")
    attempts: list[AttemptView]
    next_attempt_at: Moment | None
    created_at: Moment
    finished_at: Moment | None

    @classmethod
    def of(cls, delivery: Delivery, attempts: Sequence[DeliveryAttempt]) -> Self:
        """The delivery as its tenant sees it."""
        waiting = delivery.status == DeliveryStatus.PENDING
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
                AttemptView(outcome=AttemptOutcome(each.outcome), at=each.at.replace(microsecond=0))
                for each in attempts
            ],
            next_attempt_at=delivery.next_attempt_at if waiting else None,
            created_at=delivery.created_at,
            finished_at=delivery.finished_at,
        )


class ReplayInput(BaseModel):
    """Which deliveries to send anew: those that ended exhausted since then."""

    model_config = ConfigDict(extra="forbid")

    since: AwareDatetime
    webhook_id: str | None = None


class ReplayResult(BaseModel):
    """How many will be sent anew."""

    object: Literal["replay"] = "replay"
    replayed: int


def show(session: Session, found: Sequence[Delivery]) -> list[DeliveryView]:
    """The deliveries with their attempts."""
    attempts = delivery_log.attempts(session, found)
    return [DeliveryView.of(delivery, attempts[delivery.id]) for delivery in found]


@router.get("", responses=documented(HTTPStatus.UNPROCESSABLE_ENTITY))
def list_deliveries(
    tenant_id: TenantId,
    deps: Deps,
    webhook_id: Annotated[str | None, Query(pattern=r"^whk_[0-9a-f]{32}$")] = None,
    job_id: Annotated[str | None, Query(pattern=r"^job_[0-9a-f]{32}$")] = None,
    batch_id: Annotated[str | None, Query(pattern=r"^bat_[0-9a-f]{32}$")] = None,
    status: DeliveryStatus | None = None,
    limit: Limit = 20,
    cursor: DeliveryCursor = None,
) -> Page[DeliveryView]:
    """All webhooks, those to URLs of single jobs and batches included. Newest first."""
    which = DeliveryFilter(endpoint_id=webhook_id, job_id=job_id, batch_id=batch_id, status=status)
    with deps.sessions.begin() as session:
        found = delivery_log.page(session, tenant_id, which, limit=limit + 1, after=cursor)
        views = show(session, found[:limit])
    return Page(data=views, next_cursor=views[-1].id if len(found) > limit else None)


@router.get("/{delivery_id}", responses=documented(HTTPStatus.NOT_FOUND))
def show_delivery(delivery_id: str, tenant_id: TenantId, deps: Deps) -> DeliveryView:
    """The delivery and its attempts."""
    with deps.sessions.begin() as session:
        return show(session, [delivery_log.find(session, tenant_id, delivery_id)])[0]


@router.post(
    "/{delivery_id}/replay",
    status_code=HTTPStatus.ACCEPTED,
    responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
)
def replay_delivery(delivery_id: str, tenant_id: TenantId, deps: Deps) -> DeliveryView:
    """Send it anew, whatever became of it, under the same `webhook-id`."""
    with deps.sessions.begin() as session:
        view = show(session, [delivery_log.replay(session, tenant_id, delivery_id)])[0]
    deps.notifier.notify_webhook_senders()
    return view


@router.post(
    "/replay",
    status_code=HTTPStatus.ACCEPTED,
    responses=documented(HTTPStatus.UNPROCESSABLE_ENTITY),
)
def replay_failed(asked: ReplayInput, tenant_id: TenantId, deps: Deps) -> ReplayResult:
    """Send anew all that were never accepted since a time, each under its old `webhook-id`."""
    with deps.sessions.begin() as session:
        count = delivery_log.replay_failed(
            session, tenant_id, since=asked.since, endpoint_id=asked.webhook_id
        )
    deps.notifier.notify_webhook_senders()
    return ReplayResult(replayed=count)
