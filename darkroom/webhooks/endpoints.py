"""Webhook endpoints: who wants to be told what, the secrets that sign it, and their health."""

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
_PROBLEMS_TOLD: Final = 1000
OVERLAP: Final = timedelta(hours=24)  #: how long a replaced secret signs beside the new one
_LIVE: Final = WebhookEndpoint.deleted_at.is_(None)


logger = logging.getLogger(__name__)


class TooManyEndpoints(DarkroomError):
    """The tenant has as many webhook endpoints as it may; nothing was created."""


class EndpointDisabled(DarkroomError):
    """The endpoint is called no more until its owner enables it."""


@dataclass(frozen=True)
class NewEndpoint:
    """An endpoint at its birth: the only time its secret is shown."""

    endpoint: WebhookEndpoint
    secret: str


def create(
    session: Session,
    tenant_id: str,
    *,
    url: str,
    kinds: Collection[EventType],
    seal: SecretBox,
    most: int,
) -> NewEndpoint:
    """An endpoint for these types. The caller has vetted the URL. Raises TooManyEndpoints."""
    one_at_a_time = select(Tenant.id).where(Tenant.id == tenant_id)
    session.execute(one_at_a_time.with_for_update(key_share=True))
    theirs = and_(WebhookEndpoint.tenant_id == tenant_id, _LIVE)
    count = session.scalar(select(func.count()).select_from(WebhookEndpoint).where(theirs)) or 0
    if count >= most:
        raise TooManyEndpoints(f"there are {count} webhook endpoints already; delete one first")
    secret = signatures.new_secret()
    endpoint = session.scalars(
        insert(WebhookEndpoint)
        .values(
            id=new_id("whk"),
            tenant_id=tenant_id,
            url=url,
            events=sorted(kinds),
            secret=seal.close(secret),
        )
        .returning(WebhookEndpoint)
    ).one()
    return NewEndpoint(endpoint, secret)


def check_own_url(url: str | None, policy: UrlPolicy, *, loc: Loc = ("webhook_url",)) -> None:
    """Whether a URL that a client gave may be called. Raises InvalidInput."""
    if problem := _problem_of(url, policy, loc):
        raise InvalidInput([problem])


def _problem_of(url: str | None, policy: UrlPolicy, loc: Loc) -> InputProblem | None:
    try:
        if url is not None:
            check_url(url, policy)
    except UrlNotAllowed as blocked:
        return InputProblem(loc, "url_not_allowed", str(blocked))
    return None


def find(session: Session, tenant_id: str, endpoint_id: str) -> WebhookEndpoint:
    """The tenant's endpoint. Raises NotFound, also for another tenant's."""
    theirs = and_(WebhookEndpoint.tenant_id == tenant_id, WebhookEndpoint.id == endpoint_id, _LIVE)
    known = is_id("whk", endpoint_id)
    endpoint = session.scalar(select(WebhookEndpoint).where(theirs)) if known else None
    if endpoint is None:
        raise NotFound("webhook", endpoint_id)
    return endpoint


def page(
    session: Session, tenant_id: str, *, limit: int, after: str | None = None
) -> Sequence[WebhookEndpoint]:
    """Newest first; `after` is the last id already seen."""
    newest = select(WebhookEndpoint).where(WebhookEndpoint.tenant_id == tenant_id, _LIVE)
    if after is not None:
        newest = newest.where(WebhookEndpoint.id < after)
    return session.scalars(newest.order_by(WebhookEndpoint.id.desc()).limit(limit)).all()


def remove(session: Session, tenant_id: str, endpoint_id: str) -> None:
    """Call it no more and forget its secrets; its deliveries stay in the log. Raises NotFound."""
    endpoint = find(session, tenant_id, endpoint_id)
    session.execute(
        update(WebhookEndpoint)
        .where(WebhookEndpoint.id == endpoint.id)
        .values(deleted_at=func.now(), secret="", old_secret=None, old_secret_until=None)
    )


def enable(session: Session, tenant_id: str, endpoint_id: str) -> WebhookEndpoint:
    """Call it again after it was given up. Raises NotFound."""
    endpoint = find(session, tenant_id, endpoint_id)
    return session.scalars(
        update(WebhookEndpoint)
        .where(WebhookEndpoint.id == endpoint.id)
        .values(disabled_at=None, disabled_reason=None, failing_since=None)
        .returning(WebhookEndpoint)
    ).one()


def send_test(session: Session, tenant_id: str, endpoint_id: str) -> str:
    """Have a `webhook.test` delivered; its delivery's id. Raises NotFound, EndpointDisabled."""
    endpoint = find(session, tenant_id, endpoint_id)
    if endpoint.disabled_at is not None:
        raise EndpointDisabled(f"webhook {endpoint_id} is disabled; enable it first")
    return event_log.record_test(session, endpoint)


def rotate(session: Session, tenant_id: str, endpoint_id: str, *, seal: SecretBox) -> NewEndpoint:
    """A new secret; for a day the old one signs as well. Raises NotFound."""
    endpoint = find(session, tenant_id, endpoint_id)
    secret = signatures.new_secret()
    rotated = session.scalars(
        update(WebhookEndpoint)
        .where(WebhookEndpoint.id == endpoint.id)
        .values(
            secret=seal.close(secret),
            old_secret=WebhookEndpoint.secret,
            old_secret_until=func.now() + OVERLAP,
        )
        .returning(WebhookEndpoint)
    ).one()
    return NewEndpoint(rotated, secret)


def tenant_secret(session: Session, tenant_id: str, *, seal: SecretBox) -> str:
    """What signs webhooks to URLs of single jobs and batches of the tenant; made at first use."""
    made = {"tenant_id": tenant_id, "secret": seal.close(signatures.new_secret())}
    session.execute(upsert(WebhookSecret).values(made).on_conflict_do_nothing())
    stored = select(WebhookSecret.secret).where(WebhookSecret.tenant_id == tenant_id)
    return seal.open(session.scalars(stored).one())


def rotate_tenant_secret(session: Session, tenant_id: str, *, seal: SecretBox) -> str:
    """A new secret; for a day the old one signs as well."""
    tenant_secret(session, tenant_id, seal=seal)
    secret = signatures.new_secret()
    session.execute(
        update(WebhookSecret)
        .where(WebhookSecret.tenant_id == tenant_id)
        .values(
            secret=seal.close(secret),
            old_secret=WebhookSecret.secret,
            old_secret_until=func.now() + OVERLAP,
        )
    )
    return secret


def secrets_of(
    session: Session, *, endpoint_ids: Collection[str], tenant_ids: Collection[str], seal: SecretBox
) -> dict[str, list[str]]:
    """What signs now, newest first, for each endpoint and each tenant's own URLs.

    Without those whose seal cannot be opened: the log says so, and others are not held up.
    """
    for tenant_id in tenant_ids:
        tenant_secret(session, tenant_id, seal=seal)
    found: dict[str, list[str]] = {}
    for table, owners in ((WebhookEndpoint, endpoint_ids), (WebhookSecret, tenant_ids)):
        stored = _secrets_in(table)
        rows = session.connection().execute(stored, {"owners": list(owners)}) if owners else ()
        for owner, secret, old, old_lives in rows:
            try:
                found[owner] = [seal.open(each) for each in (secret, *([old] if old_lives else []))]
            except SetupError as error:
                logger.error("nothing can be signed for %s: %s", owner, error)  # noqa: TRY400
    return found


@functools.cache  # to word it takes longer than to run it
def _secrets_in(table: type[WebhookEndpoint | WebhookSecret]) -> Select[*tuple[Any, ...]]:
    key = WebhookEndpoint.id if table is WebhookEndpoint else WebhookSecret.tenant_id
    return select(
        key,
        table.secret,
        func.coalesce(table.old_secret, "").label("old"),
        table.old_secret_until > func.now(),
    ).where(key == any_(bindparam("owners", type_=ARRAY(Text))))


def note_successes(session: Session, endpoint_ids: Collection[str]) -> None:
    """These answered well: whatever failed before is forgiven."""
    if not endpoint_ids or not session.connection().scalar(_failing(), {"ids": list(endpoint_ids)}):
        return
    _mark(session, endpoint_ids, WebhookEndpoint.failing_since.is_not(None), None)


@functools.cache
def _failing() -> Select[*tuple[Any, ...]]:
    """Whether any of `ids` has failures to be forgiven: mostly not, and often asked."""
    theirs = WebhookEndpoint.id == any_(bindparam("ids", type_=ARRAY(Text)))
    return select(exists().where(theirs, WebhookEndpoint.failing_since.is_not(None)))


def note_failures(session: Session, endpoint_ids: Collection[str]) -> None:
    """These failed; since when, is kept from the first time."""
    _mark(session, endpoint_ids, WebhookEndpoint.failing_since.is_(None), func.now())


def _mark(
    session: Session,
    endpoint_ids: Collection[str],
    changes: ColumnElement[bool],
    since: object,
) -> None:
    """Only rows that change are written, and in one order: two senders must not wait in a ring."""
    if not endpoint_ids:
        return
    locked = (
        select(WebhookEndpoint.id)
        .where(WebhookEndpoint.id.in_(endpoint_ids), changes)
        .order_by(WebhookEndpoint.id)
        .with_for_update(key_share=True)  # whoever makes deliveries for it need not wait
        .cte("locked")
    )
    session.execute(
        update(WebhookEndpoint)
        .where(WebhookEndpoint.id.in_(select(locked.c.id)))
        .values(failing_since=since)
    )


def disable_failing(
    session: Session, endpoint_ids: Collection[str], *, gone: Iterable[str]
) -> Sequence[str]:
    """Disable those of the endpoints that asked for it (`gone`) or failed for five days.

    The tenant's other endpoints are told. The ids of those that were disabled now.
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
