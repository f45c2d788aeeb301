"""The HTTP application, built from settings."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Final

from anyio import CapacityLimiter
from fastapi import APIRouter, FastAPI
from fastapi.responses import RedirectResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import (
    admin,
    batches,
    deliveries,
    errors,
    events,
    health,
    jobs,
    metrics,
    models,
    queue,
    results,
    webhooks,
)
from api.activity import ActivityCollector
from api.dependencies import Dependencies
from api.events import open_stream_hub
from api.key_cache import ApiKeyCache
from api.openapi import TAGS, openapi, operation_id
from api.schemas import webhook_payloads
from api.snapshot_cache import SnapshotCache
from darkroom import __version__
from darkroom.db.connection import open_sessions
from darkroom.generation.model_registry import load_registry
from darkroom.jobs.group_commit import GroupCommitter
from darkroom.jobs.progress import open_progress_redis
from darkroom.queue.notifier import WorkNotifier
from darkroom.redis_client import open_redis
from darkroom.settings import Settings
from darkroom.storage.images import S3Store
from darkroom.webhooks.secret_box import SecretBox
from darkroom.webhooks.url_policy import policy_of

MAX_JSON_BYTES: Final = 64 * 2**10
_IMPORTS_AT_ONCE: Final = 2  # by one process
_STREAMED: Final = "/v1/batches"  # counts its own bytes, against a larger limit

_DESCRIPTION: Final = """\
Generates images from prompts, in batches. Submit a job or a file of jobs; poll, wait with
`Prefer: wait`, or follow the events; fetch the image. A 202 means that the job is committed and
will reach exactly one final status. Errors are RFC 9457 problems with a stable `code`.
"""


def open_dependencies(settings: Settings) -> Dependencies:
    """Open clients and caches. Connections are made when first needed."""
    sessions = open_sessions(settings.database_url.get_secret_value())
    progress_redis = open_progress_redis(settings)
    registry = load_registry(settings.models_dir, settings.default_model)
    group_committer = GroupCommitter(sessions)
    snapshot_cache = SnapshotCache(sessions, registry)
    return Dependencies(
        settings=settings,
        sessions=sessions,
        registry=registry,
        store=S3Store(settings),
        redis=open_redis(settings),
        progress_redis=progress_redis,
        notifier=WorkNotifier(settings),
        streams=open_stream_hub(sessions, progress_redis),
        group_committer=group_committer,
        snapshot_cache=snapshot_cache,
        key_cache=ApiKeyCache(sessions),
        url_policy=policy_of(settings),
        secret_box=SecretBox(settings.webhook_encryption_keys.get_secret_value()),
        import_limiter=CapacityLimiter(_IMPORTS_AT_ONCE),
        metrics=metrics.open_registry(
            ActivityCollector(sessions, registry.models),
            snapshot=snapshot_cache.now,
            pending=lambda: group_committer.pending,
        ),
    )


def create_app(settings: Settings) -> FastAPI:
    """Build the application. Raise SetupError if the model registry cannot be read."""
    deps = open_dependencies(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        feed = asyncio.create_task(deps.streams.run())
        yield
        feed.cancel()
        deps.group_committer.close()
        deps.snapshot_cache.close()
        deps.notifier.close()

    app = FastAPIOffline(  # serves the files of /docs itself: they work without internet
        redoc_url=None,
        title="Darkroom",
        version=__version__,
        description=_DESCRIPTION,
        openapi_tags=TAGS,
        generate_unique_id_function=operation_id,
        webhooks=APIRouter(generate_unique_id_function=operation_id),
        lifespan=lifespan,
    )
    app.state.deps = deps
    app.openapi = lambda: openapi(app)  # type: ignore[method-assign]  # FastAPI's documented way
    routers = (
        *(jobs, batches, events, results, webhooks, deliveries, models),
        *(queue, admin, health, metrics),
    )
    for router in (each.router for each in routers):
        app.include_router(router)
    webhook_payloads.document(app.webhooks)
    app.add_api_route("/", _redirect_to_docs, include_in_schema=False)
    app.add_middleware(BodyLimit)
    errors.install(app)
    app.add_exception_handler(events.StreamExhausted, events.no_content)
    return app


def _redirect_to_docs() -> RedirectResponse:
    return RedirectResponse("/docs")


class BodyLimit:
    """Middleware that refuses a body beyond its limit during the upload, before any parsing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count the bytes of a body, except where a route streams it."""
        if scope["type"] != "http" or scope["path"] == _STREAMED:
            await self._app(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_JSON_BYTES:
                detail = (
                    f"the body is larger than {MAX_JSON_BYTES:,} bytes; send many jobs as a batch"
                )
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail)
            return message

        await self._app(scope, counted, send)
