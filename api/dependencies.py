"""What every route works with, and for whom: the dependencies of a request."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Annotated, Final
from urllib.parse import urlsplit

from anyio import CapacityLimiter
from fastapi import Depends, Request, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPBearer
from redis import Redis
from sqlalchemy.orm import Session

from api.errors import ProblemException
from api.key_cache import ApiKeyCache
from api.schemas.batches import BatchView
from api.schemas.jobs import JobView, QueuePosition
from api.snapshot_cache import SnapshotCache
from api.stream_hub import StreamHub
from darkroom import batches
from darkroom.batches import Counts
from darkroom.db.connection import Sessions
from darkroom.db.tables import DEFAULT_TENANT, Batch, Job
from darkroom.forecast.eta import Eta
from darkroom.forecast.snapshot import QueueSnapshot
from darkroom.generation.model_registry import ModelRegistry
from darkroom.jobs import progress
from darkroom.jobs.group_commit import GroupCommitter
from darkroom.queue.notifier import WorkNotifier
from darkroom.settings import Settings
from darkroom.status import Scope, Status
from darkroom.storage.images import ImageStore
from darkroom.webhooks.secret_box import SecretBox
from darkroom.webhooks.url_policy import UrlPolicy

_LOOPBACK_NAMES: Final = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True)
class Dependencies:
    """What the API process holds open."""

    settings: Settings
    sessions: Sessions
    registry: ModelRegistry
    store: ImageStore
    redis: "Redis"
    board: "Redis"  #: for `darkroom.jobs.progress` alone: it gives up sooner
    notifier: WorkNotifier
    streams: StreamHub
    group_committer: GroupCommitter
    snapshot_cache: SnapshotCache
    keyring: ApiKeyCache
    policy: UrlPolicy  #: of the URLs that webhooks may go to
    secret_box: SecretBox
    importers: CapacityLimiter

    def job_view(self, job: Job, *, position: int | None = None) -> JobView:
        """The job as clients see it; `position`: in the queue, if it is known."""
        [view] = self.job_views([job], position=position)
        return view

    def job_views(self, jobs: Sequence[Job], *, position: int | None = None) -> list[JobView]:
        """The jobs as clients see them. Asks Redis, once, if any of them runs."""
        steps = progress.read(self.board, jobs)
        look = self.snapshot_cache.recall()
        return [
            JobView.of(
                job,
                queue=QueuePosition.of(job, look, position),
                steps=steps.get(job.id),
                store=self.store,
                url_ttl_s=self.settings.image_url_ttl_s,
            )
            for job in jobs
        ]

    def batch_view(self, session: Session, batch: Batch) -> BatchView:
        """The batch as clients see it, and its counts now."""
        [view] = self.batch_views(session, [batch])
        return view

    def batch_views(self, session: Session, found: Sequence[Batch]) -> list[BatchView]:
        """The batches as clients see them, and their counts now."""
        counted = batches.count(session, found)
        unfinished = any(batch.finished_at is None for batch in found)
        look = self.snapshot_cache.now() if unfinished else None
        return [
            BatchView.of(batch, counts, _eta(session, look, batch, counts))
            for batch, counts in zip(found, counted, strict=True)
        ]


def _eta(session: Session, look: QueueSnapshot | None, batch: Batch, counts: Counts) -> Eta | None:
    if look is None:
        return None
    waiting = bool(counts.by_status.get(Status.QUEUED))
    return look.of_batch(session, batch, waiting=waiting)


async def dependencies(
    request: Request,
) -> Dependencies:  # async: FastAPI would send a plain one to a thread
    """The process's tools, put into its state when it started."""
    held: Dependencies = request.app.state.tools
    return held


Deps = Annotated[Dependencies, Depends(dependencies)]


class ApiKeyAuth(HTTPBearer):
    """Whose request this is. Refuses a missing or dead key, and one without the scope.

    One dependency, and not a tree of them: FastAPI takes as long to resolve a small tree as the
    database to queue a job.
    """

    def __init__(self, scope: Scope, *, to_read: Scope | None = None) -> None:
        """`to_read`: the scope that is enough for GET and HEAD."""
        super().__init__(
            scheme_name="HTTPBearer",
            description="An API key: `darkroom keys create`.",
            auto_error=False,
        )
        self._scope = scope
        self._to_read = to_read or scope

    async def __call__(self, request: Request) -> str:  # type: ignore[override]
        """The tenant's id."""
        deps: Dependencies = request.app.state.tools
        if deps.settings.auth == "off":
            _refuse_untrusted_host(request)
            return DEFAULT_TENANT
        credentials = await super().__call__(request)
        if credentials is None:
            raise ProblemException(
                HTTPStatus.UNAUTHORIZED, "missing_api_key", "send Authorization: Bearer dk_…"
            )
        secret = credentials.credentials
        key = deps.keyring.recall(secret) or await run_in_threadpool(deps.keyring.find, secret)
        if key is None:
            detail = "the key is unknown, expired or revoked"
            raise ProblemException(HTTPStatus.UNAUTHORIZED, "invalid_api_key", detail)
        scope = self._to_read if request.method in {"GET", "HEAD"} else self._scope
        if not {scope, Scope.ADMIN} & set(key.scopes):
            raise ProblemException(
                HTTPStatus.FORBIDDEN, "missing_scope", f"the key lacks the scope {scope}"
            )
        request.state.key_id = key.id
        return key.tenant_id


def key_id(request: Request) -> str | None:
    """Of the key that let this request in; None where none is needed."""
    held: str | None = getattr(request.state, "key_id", None)
    return held


def _refuse_untrusted_host(request: Request) -> None:
    """Without keys, a web page must not reach us by having its own name point at this machine."""
    if not _is_local(request.headers.get("host", "")):
        detail = "without keys (DARKROOM_AUTH=off) only requests to localhost are answered"
        raise ProblemException(HTTPStatus.FORBIDDEN, "untrusted_host", detail)


@lru_cache(maxsize=64)
def _is_local(host: str) -> bool:
    try:
        return urlsplit(f"//{host}").hostname in _LOOPBACK_NAMES
    except ValueError:
        return False


TenantId = Annotated[str, Security(ApiKeyAuth(Scope.SUBMIT, to_read=Scope.READ))]
#: as TenantId, for what a key that may only read must not see
OwnerId = Annotated[str, Security(ApiKeyAuth(Scope.SUBMIT))]
#: as TenantId, for what concerns the whole installation
AdminId = Annotated[str, Security(ApiKeyAuth(Scope.ADMIN))]
