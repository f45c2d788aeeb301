"""Webhook endpoints: subscriptions, signing secrets, and health."""

import functools
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeAlias

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Select,
    Text,
    and_,
    any_,
    bindparam,
    case,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from darkroom.db.tables import Tenant
from darkroom.db.webhook_tables import WebhookEndpoint, WebhookSecret
from darkroom.errors import DarkroomError, InputProblem, InvalidInput, NotFound, SetupError
from darkroom.event_types import EventType
from darkroom.events import log as event_log
from darkroom.ids import is_id, new_id
from darkroom.webhooks import signatures
from darkroom.webhooks.secret_box import SecretBox
from darkroom.webhooks.url_policy import UrlNotAllowed, UrlPolicy, check_url

Loc: TypeAlias = tuple[str | int, ...]

DISABLED_AFTER: Final = timedelta(days=5)  #: of failures without a success between them
OVERLAP: Final = timedelta(hours=24)  #: during which a replaced secret still signs too
_LIVE: Final = WebhookEndpoint.deleted_at.is_(None)

logger = logging.getLogger(__name__)


class TooManyEndpoints(DarkroomError):
    """The tenant already has its maximum of webhook endpoints; nothing was created."""


class EndpointDisabled(DarkroomError):
    """The endpoint receives nothing until its owner enables it."""


@dataclass(frozen=True)
class NewEndpoint:
    """Endpoint with its new secret, which is shown only this once."""

    endpoint: WebhookEndpoint
    secret: str


def create(
    session: Session,
    tenant_id: str,
    *,
    url: str,
    event_types: Collection[EventType],
    secret_box: SecretBox,
    max_endpoints: int,
) -> NewEndpoint:
    """Create an endpoint for a URL that the caller has checked. Raise TooManyEndpoints."""
    tenant = select(Tenant.id).where(Tenant.id == tenant_id)
    session.execute(tenant.with_for_update(key_share=True))  # so that the count below holds
    theirs = and_(WebhookEndpoint.tenant_id == tenant_id, _LIVE)
    count = session.scalar(select(func.count()).select_from(WebhookEndpoint).where(theirs)) or 0
    if count >= max_endpoints:
        raise TooManyEndpoints(
            f"the tenant has {count} webhook endpoints, the maximum is {max_endpoints}; "
            "delete one first"
        )
    secret = signatures.new_secret()
    endpoint = session.scalars(
        insert(WebhookEndpoint)
        .values(
            id=new_id("whk"),
            tenant_id=tenant_id,
            url=url,
            events=sorted(event_types),
            secret=secret_box.encrypt(secret),
        )
        .returning(WebhookEndpoint)
    ).one()
    return NewEndpoint(endpoint, secret)


def check_own_url(url: str | None, policy: UrlPolicy, *, loc: Loc = ("webhook_url",)) -> None:
    """Raise InvalidInput for the field `loc` if the policy forbids a client's URL."""
    try:
        if url is not None:
            check_url(url, policy)
    except UrlNotAllowed as error:
        raise InvalidInput([InputProblem(loc, "url_not_allowed", str(error))]) from error


def find(session: Session, tenant_id: str, endpoint_id: str) -> WebhookEndpoint:
    """Return the tenant's endpoint. Raise NotFound, also if it is another tenant's."""
    theirs = and_(WebhookEndpoint.tenant_id == tenant_id, WebhookEndpoint.id == endpoint_id, _LIVE)
    valid = is_id("whk", endpoint_id)
    endpoint = session.scalar(select(WebhookEndpoint).where(theirs)) if valid else None
    if endpoint is None:
        raise NotFound("webhook", endpoint_id)
    return endpoint


def page(
    session: Session, tenant_id: str, *, limit: int, after: str | None = None
) -> Sequence[WebhookEndpoint]:
    """Return one page of endpoints, newest first, after the id `after`."""
    newest = select(WebhookEndpoint).where(WebhookEndpoint.tenant_id == tenant_id, _LIVE)
    if after is not None:
        newest = newest.where(WebhookEndpoint.id < after)
    return session.scalars(newest.order_by(WebhookEndpoint.id.desc()).limit(limit)).all()


def remove(session: Session, tenant_id: str, endpoint_id: str) -> None:
    """Delete an endpoint and its secrets; its deliveries stay in the log. Raise NotFound."""
    endpoint = find(session, tenant_id, endpoint_id)
    session.execute(
        update(WebhookEndpoint)
        .where(WebhookEndpoint.id == endpoint.id)
        .values(deleted_at=func.now(), secret="", old_secret=None, old_secret_until=None)
    )


def enable(session: Session, tenant_id: str, endpoint_id: str) -> WebhookEndpoint:
    """Enable an endpoint and clear its failures. Raise NotFound."""
    endpoint = find(session, tenant_id, endpoint_id)
    return session.scalars(
        update(WebhookEndpoint)
        .where(WebhookEndpoint.id == endpoint.id)
        .values(disabled_at=None, disabled_reason=None, failing_since=None)
        .returning(WebhookEndpoint)
    ).one()


def send_test(session: Session, tenant_id: str, endpoint_id: str) -> str:
    """Queue a `webhook.test` and return its delivery id. Raise NotFound or EndpointDisabled."""
    endpoint = find(session, tenant_id, endpoint_id)
    if endpoint.disabled_at is not None:
        raise EndpointDisabled(f"webhook endpoint {endpoint_id} is disabled; enable it first")
    return event_log.record_test(session, endpoint)


def rotate(
    session: Session, tenant_id: str, endpoint_id: str, *, secret_box: SecretBox
) -> NewEndpoint:
    """Replace the secret; the old one signs too for 24 hours. Raise NotFound."""
    endpoint = find(session, tenant_id, endpoint_id)
    secret = signatures.new_secret()
    rotated = session.scalars(
        update(WebhookEndpoint)
        .where(WebhookEndpoint.id == endpoint.id)
        .values(
            secret=secret_box.encrypt(secret),
            old_secret=WebhookEndpoint.secret,
            old_secret_until=func.now() + OVERLAP,
        )
        .returning(WebhookEndpoint)
    ).one()
    return NewEndpoint(rotated, secret)


def tenant_secret(session: Session, tenant_id: str, *, secret_box: SecretBox) -> str:
    """Return the secret for URLs of the tenant's jobs and batches; create it at first use."""
    new = {"tenant_id": tenant_id, "secret": secret_box.encrypt(signatures.new_secret())}
    session.execute(upsert(WebhookSecret).values(new).on_conflict_do_nothing())
    stored = select(WebhookSecret.secret).where(WebhookSecret.tenant_id == tenant_id)
    return secret_box.decrypt(session.scalars(stored).one())


def rotate_tenant_secret(session: Session, tenant_id: str, *, secret_box: SecretBox) -> str:
    """Replace the secret of `tenant_secret`; the old one signs too for 24 hours."""
    tenant_secret(session, tenant_id, secret_box=secret_box)
    secret = signatures.new_secret()
    session.execute(
        update(WebhookSecret)
        .where(WebhookSecret.tenant_id == tenant_id)
        .values(
            secret=secret_box.encrypt(secret),
            old_secret=WebhookSecret.secret,
            old_secret_until=func.now() + OVERLAP,
        )
    )
    return secret


def signing_secrets(
    session: Session,
    *,
    endpoint_ids: Collection[str],
    tenant_ids: Collection[str],
    secret_box: SecretBox,
) -> dict[str, list[str]]:
    """Return the secrets that sign now, newest first, of each endpoint and of each tenant's URLs.

    Owners whose secret cannot be decrypted are logged and left out, so that the others go on.
    """
    for tenant_id in tenant_ids:
        tenant_secret(session, tenant_id, secret_box=secret_box)
    found: dict[str, list[str]] = {}
    for table, owners in ((WebhookEndpoint, endpoint_ids), (WebhookSecret, tenant_ids)):
        query = _select_secrets(table)
        rows = session.connection().execute(query, {"owners": list(owners)}) if owners else ()
        for owner, secret, old, old_is_valid in rows:
            stored = (secret, old) if old_is_valid else (secret,)
            try:
                found[owner] = [secret_box.decrypt(each) for each in stored]
            except SetupError as error:
                logger.error(  # noqa: TRY400  # the traceback says no more than the message
                    "no usable signing secret for %s: %s; its deliveries are not sent", owner, error
                )
    return found


@functools.cache  # building it takes longer than running it
def _select_secrets(table: type[WebhookEndpoint | WebhookSecret]) -> Select[*tuple[Any, ...]]:
    owner = WebhookEndpoint.id if table is WebhookEndpoint else WebhookSecret.tenant_id
    return select(
        owner,
        table.secret,
        func.coalesce(table.old_secret, "").label("old"),
        table.old_secret_until > func.now(),
    ).where(owner == any_(bindparam("owners", type_=ARRAY(Text))))


def record_successes(session: Session, endpoint_ids: Collection[str]) -> None:
    """Clear `failing_since` of endpoints that accepted a webhook."""
    parameters = {"ids": list(endpoint_ids)}
    if endpoint_ids and session.connection().scalar(_select_any_failing(), parameters):
        failing = WebhookEndpoint.failing_since.is_not(None)
        _set_failing_since(session, endpoint_ids, failing, None)


@functools.cache
def _select_any_failing() -> Select[*tuple[Any, ...]]:
    """Select whether any of `ids` is failing: asked after every success, and mostly false."""
    theirs = WebhookEndpoint.id == any_(bindparam("ids", type_=ARRAY(Text)))
    return select(exists().where(theirs, WebhookEndpoint.failing_since.is_not(None)))


def record_failures(session: Session, endpoint_ids: Collection[str]) -> None:
    """Set `failing_since` of endpoints that failed for the first time since their last success."""
    _set_failing_since(session, endpoint_ids, WebhookEndpoint.failing_since.is_(None), func.now())


def _set_failing_since(
    session: Session,
    endpoint_ids: Collection[str],
    condition: ColumnElement[bool],
    moment: object,
) -> None:
    """Write only rows that change, in order of their ids: two senders must not deadlock."""
    if not endpoint_ids:
        return
    locked = (
        select(WebhookEndpoint.id)
        .where(WebhookEndpoint.id.in_(endpoint_ids), condition)
        .order_by(WebhookEndpoint.id)
        .with_for_update(key_share=True)  # does not block inserts of its deliveries
        .cte("locked")
    )
    session.execute(
        update(WebhookEndpoint)
        .where(WebhookEndpoint.id.in_(select(locked.c.id)))
        .values(failing_since=moment)
    )


def disable_failing(
    session: Session, endpoint_ids: Collection[str], *, gone: Iterable[str]
) -> Sequence[str]:
    """Disable those that answered 410 (`gone`) or failed for five days; return their ids.

    The other endpoints of their tenant get `webhook.disabled`.
    """
    asked = WebhookEndpoint.id.in_(list(gone))
    failed = WebhookEndpoint.failing_since < func.now() - DISABLED_AFTER
    disabled = session.scalars(
        update(WebhookEndpoint)
        .where(
            WebhookEndpoint.id.in_(endpoint_ids),
            WebhookEndpoint.disabled_at.is_(None),
            _LIVE,
            or_(asked, failed),
        )
        .values(disabled_at=func.now(), disabled_reason=case((asked, "gone"), else_="failing"))
        .returning(WebhookEndpoint.id)
    ).all()
    if disabled:
        event_log.record_disabled(session, disabled)
    return disabled
