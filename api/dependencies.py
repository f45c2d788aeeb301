"""What handlers are given: the process's connections, and the tenant of the request."""

from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Annotated, Final
from urllib.parse import urlsplit

from anyio import CapacityLimiter
from fastapi import Depends, Request, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPBearer
from prometheus_client import CollectorRegistry
from redis import Redis

from api.errors import ProblemException
from api.key_cache import ApiKeyCache
from api.snapshot_cache import SnapshotCache
from api.stream_hub import StreamHub
from darkroom.db.connection import Sessions
from darkroom.db.tables import DEFAULT_TENANT
from darkroom.generation.model_registry import ModelRegistry
from darkroom.jobs.group_commit import GroupCommitter
from darkroom.queue.notifier import WorkNotifier
from darkroom.settings import Settings
from darkroom.status import Scope
from darkroom.storage.images import ImageStore
from darkroom.webhooks.secret_box import SecretBox
from darkroom.webhooks.url_policy import UrlPolicy

_LOOPBACK_NAMES: Final = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True)
class Dependencies:
    """Connections and caches of the API process."""

    settings: Settings
    sessions: Sessions
    registry: ModelRegistry
    store: ImageStore
    redis: "Redis"
    progress_redis: "Redis"  #: for `darkroom.jobs.progress` alone: its timeout is shorter
    notifier: WorkNotifier
    streams: StreamHub
    group_committer: GroupCommitter
    snapshot_cache: SnapshotCache
    key_cache: ApiKeyCache
    url_policy: UrlPolicy  #: of webhook URLs
    secret_box: SecretBox
    import_limiter: CapacityLimiter
    metrics: CollectorRegistry


# async, because FastAPI would send a plain function to a thread
async def dependencies(request: Request) -> Dependencies:
    """Return the process's dependencies, which its start put into the app's state."""
    deps: Dependencies = request.app.state.deps
    return deps


Deps = Annotated[Dependencies, Depends(dependencies)]


class ApiKeyAuth(HTTPBearer):
    """Dependency that finds the tenant of a request by its API key.

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
        """Return the tenant's id. Raise ProblemException for a missing, invalid or weaker key."""
        deps: Dependencies = request.app.state.deps
        if deps.settings.auth == "off":
            _refuse_untrusted_host(request)
            return DEFAULT_TENANT
        credentials = await super().__call__(request)
        if credentials is None:
            detail = "no API key was sent; send the header Authorization: Bearer dk_…"
            raise ProblemException(HTTPStatus.UNAUTHORIZED, "missing_api_key", detail)
        secret = credentials.credentials
        key = deps.key_cache.recall(secret) or await run_in_threadpool(deps.key_cache.find, secret)
        if key is None:
            detail = "the API key is unknown, expired or revoked; send another one"
            raise ProblemException(HTTPStatus.UNAUTHORIZED, "invalid_api_key", detail)
        scope = self._to_read if request.method in {"GET", "HEAD"} else self._scope
        if not {scope, Scope.ADMIN} & set(key.scopes):
            detail = f"the API key lacks the scope {scope.value!r}; send a key that has it"
            raise ProblemException(HTTPStatus.FORBIDDEN, "missing_scope", detail)
        request.state.key_id = key.id
        return key.tenant_id


def key_id(request: Request) -> str | None:
    """Return the id of the request's API key; None while authentication is off."""
    known: str | None = getattr(request.state, "key_id", None)
    return known


def _refuse_untrusted_host(request: Request) -> None:
    """Refuse a Host that is not loopback: without keys, DNS rebinding lets web pages in."""
    if not _is_local(request.headers.get("host", "")):
        detail = (
            "the Host header is not localhost, which DARKROOM_AUTH=off requires; use "
            "http://127.0.0.1 or set DARKROOM_AUTH=on"
        )
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
