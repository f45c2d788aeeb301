"""/v1/webhooks: webhook endpoints and their secrets; /v1/webhook-secret: that of other URLs."""

from http import HTTPStatus
from typing import Annotated, Literal, Self

from fastapi import APIRouter, Path, Query, Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from api.deliveries import (
    DeliveryCursor,
    ReplayResult,
    StatusFilter,
    WebhookDelivery,
    WebhookDeliveryList,
    delivery_page,
    render,
)
from api.dependencies import Deps, OwnerId, TenantId
from api.errors import documented
from api.parameters import Limit
from api.schemas.common import Moment, Page
from darkroom.db import webhook_tables
from darkroom.event_types import SUBSCRIBABLE, EventType
from darkroom.generation.params import WebhookUrl
from darkroom.webhooks import deliveries, delivery_log, endpoints, signatures
from darkroom.webhooks.delivery_log import DeliveryFilter

router = APIRouter(tags=["webhooks"])

WebhookId = Annotated[str, Path(description="`id` of a webhook endpoint.")]
Cursor = Annotated[
    str | None,
    Query(
        pattern=r"^whk_[0-9a-f]{32}$",
        description="`next_cursor` of the page before. Default: the first page.",
    ),
]
Since = Annotated[
    AwareDatetime,
    Query(description="RFC 3339 time with offset; deliveries exhausted before are not sent again."),
]


class NewWebhookEndpoint(BaseModel):
    """Subscription of a URL to event types."""

    model_config = ConfigDict(strict=True, extra="forbid")

    url: WebhookUrl = Field(
        description="URL that gets the POSTs: https, on port 443 or 8443, at a public address."
    )
    events: (
        Annotated[
            list[Annotated[EventType, Field(strict=False)]],
            Field(min_length=1, max_length=len(SUBSCRIBABLE)),
        ]
        | None
    ) = Field(
        None, description=f"Event types to send. Default: all, which is {', '.join(SUBSCRIBABLE)}."
    )


class WebhookEndpoint(BaseModel):
    """URL that gets the tenant's events of some types."""

    id: str = Field(description="`whk_…`.")
    object: Literal["webhook"] = "webhook"
    url: str = Field(description="URL that gets the POSTs.")
    events: list[EventType] = Field(description="Event types that are sent.")
    status: Literal["enabled", "disabled"] = Field(
        description="`disabled` after a 410 or five days of failures; then nothing is sent."
    )
    disabled_reason: str | None = Field(
        description="`gone` (it answered 410), `failing`, or null if enabled."
    )
    disabled_at: Moment | None = Field(description="When it was disabled, or null.")
    failing_since: Moment | None = Field(
        description="First failure since its last success, or null."
    )
    created_at: Moment = Field(description="When it was created.")

    @classmethod
    def of(cls, endpoint: webhook_tables.WebhookEndpoint) -> Self:
        """Render an endpoint without its secret."""
        return cls(
            id=endpoint.id,
            url=endpoint.url,
            events=[EventType(kind) for kind in endpoint.events],
            status="enabled" if endpoint.disabled_at is None else "disabled",
            disabled_reason=endpoint.disabled_reason,
            disabled_at=endpoint.disabled_at,
            failing_since=endpoint.failing_since,
            created_at=endpoint.created_at,
        )


class WebhookEndpointList(Page[WebhookEndpoint]):
    """Webhook endpoints, newest first."""


class WebhookEndpointWithSecret(WebhookEndpoint):
    """Webhook endpoint with its secret, which is shown only once."""

    secret: str = Field(description="`whsec_…`, with which the receiver verifies signatures.")


class WebhookSecret(BaseModel):
    """Secret of webhooks to the `webhook_url` of jobs and batches, and the server's public keys."""

    object: Literal["webhook_secret"] = "webhook_secret"
    secret: str = Field(description="`whsec_…`, with which the receiver verifies `v1` signatures.")
    public_key: str | None = Field(
        description="Newest of `public_keys`, or null if the server has no key pair."
    )
    public_keys: list[str] = Field(
        description="`whpk_…` keys for `v1a` signatures; two during a rotation of the server's key."
    )


@router.post(
    "/v1/webhooks",
    summary="Create a webhook endpoint",
    status_code=HTTPStatus.CREATED,
    responses=documented(HTTPStatus.CONFLICT, HTTPStatus.UNPROCESSABLE_ENTITY),
)
def create_webhook(
    asked: NewWebhookEndpoint, tenant_id: TenantId, deps: Deps
) -> WebhookEndpointWithSecret:
    """Send events to a URL, signed as in Standard Webhooks. The secret is shown only now."""
    endpoints.check_own_url(asked.url, deps.url_policy, loc=("body", "url"))
    with deps.sessions.begin() as session:
        created = endpoints.create(
            session,
            tenant_id,
            url=asked.url,
            event_types=set(asked.events or SUBSCRIBABLE),
            secret_box=deps.secret_box,
            max_endpoints=deps.settings.webhook_max_endpoints,
        )
    return _with_secret(created)


@router.get("/v1/webhooks", summary="List webhook endpoints")
def list_webhooks(
    tenant_id: TenantId, deps: Deps, limit: Limit = 20, cursor: Cursor = None
) -> WebhookEndpointList:
    """Return the tenant's webhook endpoints, newest first."""
    with deps.sessions.begin() as session:
        found = endpoints.page(session, tenant_id, limit=limit + 1, after=cursor)
    data = [WebhookEndpoint.of(endpoint) for endpoint in found[:limit]]
    return WebhookEndpointList(data=data, next_cursor=data[-1].id if len(found) > limit else None)


@router.get(
    "/v1/webhooks/{webhook_id}",
    summary="Get a webhook endpoint",
    responses=documented(HTTPStatus.NOT_FOUND),
)
def get_webhook(webhook_id: WebhookId, tenant_id: TenantId, deps: Deps) -> WebhookEndpoint:
    """Return an endpoint with its status, without its secret."""
    with deps.sessions.begin() as session:
        return WebhookEndpoint.of(endpoints.find(session, tenant_id, webhook_id))


@router.delete(
    "/v1/webhooks/{webhook_id}",
    summary="Delete a webhook endpoint",
    status_code=HTTPStatus.NO_CONTENT,
    response_class=Response,
    responses=documented(HTTPStatus.NOT_FOUND),
)
def delete_webhook(webhook_id: WebhookId, tenant_id: TenantId, deps: Deps) -> Response:
    """Delete an endpoint and discard its pending deliveries."""
    with deps.sessions.begin() as session:
        endpoints.remove(session, tenant_id, webhook_id)
        deliveries.drop_pending(session, webhook_id)
    return Response(status_code=HTTPStatus.NO_CONTENT)


@router.post(
    "/v1/webhooks/{webhook_id}/test",
    summary="Test a webhook endpoint",
    status_code=HTTPStatus.ACCEPTED,
    responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
)
def test_webhook(webhook_id: WebhookId, tenant_id: TenantId, deps: Deps) -> WebhookDelivery:
    """Send a `webhook.test` event. Get the returned delivery again to see its outcome."""
    with deps.sessions.begin() as session:
        delivery_id = endpoints.send_test(session, tenant_id, webhook_id)
        delivery = render(session, [delivery_log.find(session, tenant_id, delivery_id)])[0]
    deps.notifier.notify_webhook_senders()
    return delivery


@router.post(
    "/v1/webhooks/{webhook_id}/rotate-secret",
    summary="Rotate the secret of a webhook endpoint",
    responses=documented(HTTPStatus.NOT_FOUND),
)
def rotate_endpoint_secret(
    webhook_id: WebhookId, tenant_id: TenantId, deps: Deps
) -> WebhookEndpointWithSecret:
    """Replace the secret. Webhooks carry signatures of both secrets for 24 hours."""
    with deps.sessions.begin() as session:
        rotated = endpoints.rotate(session, tenant_id, webhook_id, secret_box=deps.secret_box)
    return _with_secret(rotated)


@router.post(
    "/v1/webhooks/{webhook_id}/enable",
    summary="Enable a webhook endpoint",
    responses=documented(HTTPStatus.NOT_FOUND),
)
def enable_webhook(webhook_id: WebhookId, tenant_id: TenantId, deps: Deps) -> WebhookEndpoint:
    """Send events to a disabled endpoint again. Replay the deliveries that it missed."""
    with deps.sessions.begin() as session:
        return WebhookEndpoint.of(endpoints.enable(session, tenant_id, webhook_id))


@router.get(
    "/v1/webhooks/{webhook_id}/deliveries",
    summary="List the deliveries of a webhook endpoint",
    responses=documented(HTTPStatus.NOT_FOUND),
)
def list_webhook_deliveries(
    webhook_id: WebhookId,
    tenant_id: TenantId,
    deps: Deps,
    status: StatusFilter = None,
    limit: Limit = 20,
    cursor: DeliveryCursor = None,
) -> WebhookDeliveryList:
    """Return the deliveries to an endpoint with their attempts, newest first."""
    filters = DeliveryFilter(endpoint_id=webhook_id, status=status)
    with deps.sessions.begin() as session:
        endpoints.find(session, tenant_id, webhook_id)
        return delivery_page(session, tenant_id, filters, limit=limit, cursor=cursor)


@router.post(
    "/v1/webhooks/{webhook_id}/replay",
    summary="Replay the exhausted deliveries of a webhook endpoint",
    status_code=HTTPStatus.ACCEPTED,
    responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY),
)
def replay_webhook(
    webhook_id: WebhookId, tenant_id: TenantId, deps: Deps, since: Since
) -> ReplayResult:
    """Send its deliveries exhausted since a time again, each with its old `webhook-id`."""
    with deps.sessions.begin() as session:
        endpoints.find(session, tenant_id, webhook_id)
        count = delivery_log.replay_failed(session, tenant_id, since=since, endpoint_id=webhook_id)
    deps.notifier.notify_webhook_senders()
    return ReplayResult(replayed=count)


@router.get("/v1/webhook-secret", summary="Get the secret of job and batch webhooks")
def get_webhook_secret(tenant_id: OwnerId, deps: Deps) -> WebhookSecret:
    """Return what signs webhooks to the `webhook_url` of a job or a batch."""
    with deps.sessions.begin() as session:
        secret = endpoints.tenant_secret(session, tenant_id, secret_box=deps.secret_box)
    return _secret(deps, secret)


@router.post("/v1/webhook-secret/rotate", summary="Rotate the secret of job and batch webhooks")
def rotate_webhook_secret(tenant_id: OwnerId, deps: Deps) -> WebhookSecret:
    """Replace the secret. Webhooks carry signatures of both secrets for 24 hours."""
    with deps.sessions.begin() as session:
        secret = endpoints.rotate_tenant_secret(session, tenant_id, secret_box=deps.secret_box)
    return _secret(deps, secret)


def _with_secret(new: endpoints.NewEndpoint) -> WebhookEndpointWithSecret:
    fields = WebhookEndpoint.of(new.endpoint).model_dump()
    return WebhookEndpointWithSecret(**fields, secret=new.secret)


def _secret(deps: Deps, secret: str) -> WebhookSecret:
    private = signatures.private_keys(deps.settings.webhook_signing_key.get_secret_value())
    public = [signatures.public_key(key) for key in private]
    return WebhookSecret(secret=secret, public_key=next(iter(public), None), public_keys=public)
