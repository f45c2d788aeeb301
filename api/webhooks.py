"""/v1/webhooks: endpoints that are told what happens; and the secret of all other webhooks."""

from http import HTTPStatus
from typing import Annotated, Literal, Self

from fastapi import APIRouter, Query, Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from api.deliveries import DeliveryCursor, DeliveryView, ReplayResult, show
from api.dependencies import Deps, OwnerId, TenantId
from api.errors import documented
from api.parameters import Limit
from api.schemas.common import Moment, Page
from darkroom.db.webhook_tables import WebhookEndpoint
from darkroom.event_types import SUBSCRIBABLE, EventType
from darkroom.generation.params import WebhookUrl
from darkroom.status import DeliveryStatus
from darkroom.webhooks import deliveries, delivery_log, endpoints, signatures
from darkroom.webhooks.delivery_log import DeliveryFilter

router = APIRouter(tags=["webhooks"])

Cursor = Annotated[str | None, Query(pattern=r"^whk_[0-9a-f]{32}$")]
Since = Annotated[
    AwareDatetime, Query(description="RFC 3339; deliveries that ended before stay as they are.")
]


class WebhookInput(BaseModel):
    """Whom to tell what."""

    model_config = ConfigDict(strict=True, extra="forbid")

    url: WebhookUrl = Field(description="https, on port 443 or 8443, at a public address.")
    events: (
        Annotated[
            list[Annotated[EventType, Field(strict=False)]],
            Field(min_length=1, max_length=len(SUBSCRIBABLE)),
        ]
        | None
    ) = Field(None, description=f"Default: all, which is {', '.join(SUBSCRIBABLE)}.")


class WebhookView(BaseModel):
    """An endpoint. `status` is `disabled` after a 410, or after five days of failures."""

    id: str
    object: Literal["webhook"] = "webhook"
    url: str
    events: list[EventType]
    status: Literal["enabled", "disabled"]
    disabled_reason: str | None
    disabled_at: Moment | None
    failing_since: Moment | None
    created_at: Moment

    @classmethod
    def of(cls, endpoint: WebhookEndpoint) -> Self:
        """The endpoint as its owner sees it."""
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


class WebhookWithSecret(WebhookView):
    """With its secret, which is shown this once."""

    secret: str


class SecretView(BaseModel):
    """What signs webhooks; public keys too when this server signs with ed25519 as well."""

    object: Literal["webhook_secret"] = "webhook_secret"
    secret: str
    public_key: str | None = Field(description="The newest of `public_keys`.")
    public_keys: list[str] = Field(description="Two while a new one replaces an old one.")


@router.post(
    "/v1/webhooks",
    status_code=HTTPStatus.CREATED,
    responses=documented(HTTPStatus.CONFLICT, HTTPStatus.UNPROCESSABLE_ENTITY),
)
def create_webhook(asked: WebhookInput, tenant_id: TenantId, deps: Deps) -> WebhookWithSecret:
    """Have events POSTed to a URL, signed as Standard Webhooks says. Keep the secret."""
    endpoints.check_own_url(asked.url, deps.url_policy, loc=("body", "url"))
    with deps.sessions.begin() as session:
        made = endpoints.create(
            session,
            tenant_id,
            url=asked.url,
            kinds=set(asked.events or SUBSCRIBABLE),
            seal=deps.secret_box,
            most=deps.settings.webhook_max_endpoints,
        )
    return WebhookWithSecret(**WebhookView.of(made.endpoint).model_dump(), secret=made.secret)


@router.get("/v1/webhooks")
def list_webhooks(
    tenant_id: TenantId, deps: Deps, limit: Limit = 20, cursor: Cursor = None
) -> Page[WebhookView]:
    """Newest first."""
    with deps.sessions.begin() as session:
        found = endpoints.page(session, tenant_id, limit=limit + 1, after=cursor)
    views = [WebhookView.of(endpoint) for endpoint in found[:limit]]
    return Page(data=views, next_cursor=views[-1].id if len(found) > limit else None)


@router.get("/v1/webhooks/{webhook_id}", responses=documented(HTTPStatus.NOT_FOUND))
def show_webhook(webhook_id: str, tenant_id: TenantId, deps: Deps) -> WebhookView:
    """The endpoint now."""
    with deps.sessions.begin() as session:
        return WebhookView.of(endpoints.find(session, tenant_id, webhook_id))


@router.delete(
    "/v1/webhooks/{webhook_id}",
    status_code=HTTPStatus.NO_CONTENT,
    response_class=Response,
    responses=documented(HTTPStatus.NOT_FOUND),
)
def delete_webhook(webhook_id: str, tenant_id: TenantId, deps: Deps) -> Response:
    """Tell it nothing any more. What waits for it ends."""
    with deps.sessions.begin() as session:
        endpoints.remove(session, tenant_id, webhook_id)
        deliveries.drop_pending(session, webhook_id)
    return Response(status_code=HTTPStatus.NO_CONTENT)


@router.post(
    "/v1/webhooks/{webhook_id}/test",
    status_code=HTTPStatus.ACCEPTED,
    responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
)
def test_webhook(webhook_id: str, tenant_id: TenantId, deps: Deps) -> DeliveryView:
    """Send it a `webhook.test`; look at the delivery to see how it went."""
    with deps.sessions.begin() as session:
        delivery_id = endpoints.send_test(session, tenant_id, webhook_id)
        view = show(session, [delivery_log.find(session, tenant_id, delivery_id)])[0]
    deps.notifier.notify_webhook_senders()
    return view


@router.post("/v1/webhooks/{webhook_id}/rotate-secret", responses=documented(HTTPStatus.NOT_FOUND))
def rotate_secret(webhook_id: str, tenant_id: TenantId, deps: Deps) -> WebhookWithSecret:
    """A new secret, shown this once. For 24 hours webhooks carry signatures of both."""
    with deps.sessions.begin() as session:
        made = endpoints.rotate(session, tenant_id, webhook_id, seal=deps.secret_box)
    return WebhookWithSecret(**WebhookView.of(made.endpoint).model_dump(), secret=made.secret)


@router.post("/v1/webhooks/{webhook_id}/enable", responses=documented(HTTPStatus.NOT_FOUND))
def enable_webhook(webhook_id: str, tenant_id: TenantId, deps: Deps) -> WebhookView:
    """Tell it again what happens from now on; replay what it missed."""
    with deps.sessions.begin() as session:
        return WebhookView.of(endpoints.enable(session, tenant_id, webhook_id))


@router.get("/v1/webhooks/{webhook_id}/deliveries", responses=documented(HTTPStatus.NOT_FOUND))
def list_webhook_deliveries(
    webhook_id: str,
    tenant_id: TenantId,
    deps: Deps,
    status: DeliveryStatus | None = None,
    limit: Limit = 20,
    cursor: DeliveryCursor = None,
) -> Page[DeliveryView]:
    """What was sent to it and how each attempt ended, newest first."""
    which = DeliveryFilter(endpoint_id=webhook_id, status=status)
    with deps.sessions.begin() as session:
        endpoints.find(session, tenant_id, webhook_id)
        found = delivery_log.page(session, tenant_id, which, limit=limit + 1, after=cursor)
        views = show(session, found[:limit])
    return Page(data=views, next_cursor=views[-1].id if len(found) > limit else None)


@router.post(
    "/v1/webhooks/{webhook_id}/replay",
    status_code=HTTPStatus.ACCEPTED,
    responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY),
)
def replay_webhook(webhook_id: str, tenant_id: TenantId, deps: Deps, since: Since) -> ReplayResult:
    """Send anew all that it has missed for good since a time, each under its old `webhook-id`."""
    with deps.sessions.begin() as session:
        endpoints.find(session, tenant_id, webhook_id)
        count = delivery_log.replay_failed(session, tenant_id, since=since, endpoint_id=webhook_id)
    deps.notifier.notify_webhook_senders()
    return ReplayResult(replayed=count)


@router.get("/v1/webhook-secret")
def show_tenant_secret(tenant_id: OwnerId, deps: Deps) -> SecretView:
    """What signs webhooks to the `webhook_url` of a job or a batch."""
    with deps.sessions.begin() as session:
        secret = endpoints.tenant_secret(session, tenant_id, seal=deps.secret_box)
    return _secret_view(deps, secret)


@router.post("/v1/webhook-secret/rotate")
def rotate_tenant_secret(tenant_id: OwnerId, deps: Deps) -> SecretView:
    """A new one. For 24 hours webhooks carry signatures of both."""
    with deps.sessions.begin() as session:
        secret = endpoints.rotate_tenant_secret(session, tenant_id, seal=deps.secret_box)
    return _secret_view(deps, secret)


def _secret_view(deps: Deps, secret: str) -> SecretView:
    private = signatures.private_keys(deps.settings.webhook_signing_key.get_secret_value())
    public = [signatures.public_key(key) for key in private]
    return SecretView(secret=secret, public_key=next(iter(public), None), public_keys=public)
