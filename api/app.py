"""The HTTP application, put together from settings."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Final

from anyio import CapacityLimiter
from fastapi import FastAPI
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
from api.dependencies import Dependencies
from api.events import event_streams
from api.key_cache import ApiKeyCache
from api.openapi import openapi
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
_IMPORTERS: Final = 2  # files that are read at once, by one process
_STREAMED: Final = "/v1/batches"  # counts its own bytes, against its own limit

_DESCRIPTION: Final = """\
Turns prompts into images, in batches. Submit a job or a file of them; poll, wait with
`Prefer: wait`, or follow the events; fetch the image. A 202 means the job is committed and will
reach exactly one end. Errors are RFC 9457 problems with a stable `code`.
"""


def open_dependencies(settings: Settings) -> Dependencies:
    """Everything but the connections, which are made when first needed."""
    sessions = open_sessions(settings.database_url.get_secret_value())
    board = open_progress_redis(settings)
    registry = load_registry(settings.models_dir, settings.default_model)
    return Dependencies(
        settings=settings,
        sessions=sessions,
        registry=registry,
        store=S3Store(settings),
        redis=open_redis(settings),
        board=board,
        notifier=WorkNotifier(settings),
        streams=event_streams(sessions, board),
        group_committer=GroupCommitter(sessions),
        snapshot_cache=SnapshotCache(sessions, registry),
        keyring=ApiKeyCache(sessions),
        policy=policy_of(settings),
        secret_box=SecretBox(settings.webhook_encryption_keys.get_secret_value()),
        importers=CapacityLimiter(_IMPORTERS),
    )


def create_app(settings: Settings) -> FastAPI:
    """The application. Raises SetupError when the model registry cannot be read."""
    held = open_dependencies(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        feeding = asyncio.create_task(held.streams.run())
        yield
        feeding.cancel()
        held.group_committer.close()
        held.snapshot_cache.close()
        held.notifier.close()

    app = FastAPIOffline(  # /docs from our own files: a stack without internet has docs too
        redoc_url=None,
        title="Darkroom",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
    )
    app.state.tools = held
    app.openapi = lambda: openapi(app)  # type: ignore[method-assign]  # FastAPI's documented way
    routers = (
        *(jobs, batches, events, results, webhooks, deliveries, models),
        *(queue, admin, health, metrics),
    )
    for router in (each.router for each in routers):
        app.include_router(router)
    webhook_payloads.document(app.webhooks)
    app.add_api_route("/", _front_page, include_in_schema=False)
    app.add_middleware(BodyLimit)
    errors.install(app)
    app.add_exception_handler(events.StreamExhausted, events.no_content)
    return app


def _front_page() -> RedirectResponse:
    return RedirectResponse("/docs")


class BodyLimit:
    """Refuses a body past its limit while it comes in, before anything parses it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count what passes, except where a route streams."""
        if scope["type"] != "http" or scope["path"] == _STREAMED:
            await self._app(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_JSON_BYTES:
                detail = f"the body is larger than {MAX_JSON_BYTES:,} bytes"
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail)
            return message

        await self._app(scope, counted, send)
