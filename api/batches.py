"""/v1/batches: a file of rows in, a batch of jobs out."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Annotated, Final, TypeAlias, TypeVar

import anyio.to_thread
from fastapi import APIRouter, Depends, Query, Request, Response

from api.dependencies import Dependencies, Deps, TenantId
from api.errors import documented
from api.idempotency import Key, respond
from api.jobs import Cursor, Limit
from api.schemas.batches import BatchView, DryRunView
from api.schemas.common import Page
from api.uploads import Upload, received
from darkroom import batches, fault_points, idempotency
from darkroom.db.connection import retry_on_serialization_failure
from darkroom.forecast.eta import Eta
from darkroom.generation.params import Label, WebhookUrl
from darkroom.idempotency import StoredResponse
from darkroom.imports import formats, importer, row_validator
from darkroom.imports.importer import ImportSummary, Limits
from darkroom.imports.row_validator import ImportOptions
from darkroom.jobs import lifecycle
from darkroom.media_types import Format
from darkroom.status import BatchStatus, Expand, OnError, Priority
from darkroom.webhooks import endpoints

router = APIRouter(prefix="/v1/batches", tags=["batches"])

_FILE: Final = {"schema": {"type": "string", "format": "binary"}}
_FORM: Final = {
    "type": "object",
    "required": ["file"],
    "properties": {"file": {"type": "string", "format": "binary"}},
}
_JSON: Final = {
    "type": "object",
    "required": ["jobs"],
    "additionalProperties": False,
    "properties": {"jobs": {"type": "array", "items": {"type": "object"}}},
}
_OPENAPI: Final = {
    "requestBody": {
        "required": True,
        "content": {
            Format.CSV: _FILE,
            Format.JSON_LINES: _FILE,
            Format.JSON: {"schema": _JSON},
            "multipart/form-data": {"schema": _FORM},
        },
    },
    "parameters": [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": "For all rows that say nothing else.",
            "schema": {"type": "string"},
        }
        for name in row_validator.DEFAULTS
    ],
}


@dataclass(frozen=True)
class Options:
    """What the query says of all rows."""

    label: Annotated[Label | None, Query(description="Yours, to find the batch again.")] = None
    on_error: Annotated[
        OnError,
        Query(
            description="`reject`: one bad row and nothing is created; `skip`: the good rows run."
        ),
    ] = OnError.REJECT
    dry_run: Annotated[
        bool, Query(description="Only say what would become of the file; nothing is created.")
    ] = False
    expand: Annotated[
        Expand | None,
        Query(
            description="A row is a sweep: `{a|b}` in its prompts and `4|8` in its numbers are "
            "choices, combined each with each (`product`) or in step (`zip`)."
        ),
    ] = None
    webhook_url: Annotated[
        WebhookUrl | None, Query(description="POSTed to when the batch has ended.")
    ] = None
    retention_days: Annotated[
        int | None,
        Query(ge=1, le=36_500, description="Days after which pictures and prompts are deleted."),
    ] = None


Done = TypeVar("Done")
_Options: TypeAlias = Annotated[Options, Depends()]
_OWN: Final = frozenset(Options.__dataclass_fields__)


@router.post(
    "",
    status_code=HTTPStatus.ACCEPTED,
    response_model=BatchView,
    openapi_extra=_OPENAPI,
    responses={
        HTTPStatus.OK.value: {"model": DryRunView, "description": "The answer to a dry run."},
        **documented(
            HTTPStatus.CONFLICT,
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            HTTPStatus.UNPROCESSABLE_ENTITY,
        ),
    },
)
async def create_batch(
    request: Request, tenant_id: TenantId, deps: Deps, options: _Options, key: Key = None
) -> Response:
    """Queue a file's rows: all of them, or none and a list of what is wrong.

    Every other parameter of the query is a default for all rows, by the name of its column.
    """
    endpoints.check_own_url(options.webhook_url, deps.policy, loc=("query", "webhook_url"))
    plan = _plan(request, deps, options)
    async with received(request, max_bytes=deps.settings.max_upload_bytes) as upload:
        if options.dry_run:
            return await _alone(deps, partial(_dry_run, deps, tenant_id, upload, plan))
        asked = b"\0".join((b"batch", upload.digest, upload.kind.encode(), _query(request)))
        work = partial(_submit, deps, tenant_id, upload, plan, options, key, asked)
        answer = await _alone(deps, partial(retry_on_serialization_failure, work))
    deps.notifier.notify_workers()
    return respond(answer)


def _plan(request: Request, deps: Dependencies, options: Options) -> ImportOptions:
    given = [item for item in request.query_params.multi_items() if item[0] not in _OWN]
    defaults = row_validator.read_defaults(given, lists=options.expand is not None)
    return ImportOptions(deps.registry, deps.policy, defaults, options.expand)


def _query(request: Request) -> bytes:
    """All of it, in one order."""
    return repr(sorted(request.query_params.multi_items())).encode()


async def _alone(deps: Dependencies, work: Callable[[], Done]) -> Done:
    """Few imports at a time: more would only share the processor, and starve all else of it."""
    return await anyio.to_thread.run_sync(work, limiter=deps.importers)


def _limits(deps: Dependencies) -> Limits:
    return Limits(deps.settings.max_upload_rows, deps.settings.max_batch_jobs)


def _dry_run(deps: Dependencies, tenant_id: str, upload: Upload, plan: ImportOptions) -> Response:
    table = formats.read_table(upload.file, upload.kind, lists=plan.expand is not None)
    tally = importer.check(table, plan, limits=_limits(deps))
    view = DryRunView.of(tally, _eta(deps, tenant_id, tally))
    return Response(view.model_dump_json(), media_type="application/json")


def _eta(deps: Dependencies, tenant_id: str, tally: ImportSummary) -> Eta | None:
    """When a file's jobs will have ended, reckoned without them, who are not in the queue yet."""
    look = deps.snapshot_cache.now()
    return None if look is None else look.of_more(tenant_id, Priority.BULK, tally.cost)


def _submit(
    deps: Dependencies,
    tenant_id: str,
    upload: Upload,
    plan: ImportOptions,
    options: Options,
    key: str | None,
    asked: bytes,
) -> StoredResponse:
    with deps.sessions.begin() as session:

        def act() -> str:
            table = formats.read_table(upload.file, upload.kind, lists=plan.expand is not None)
            batch = batches.create(
                session,
                tenant_id,
                label=options.label,
                webhook_url=options.webhook_url,
                retention_days=options.retention_days,
            )
            tally = importer.load(
                session, batch, table, plan, on_error=options.on_error, limits=_limits(deps)
            )
            [counts] = batches.count(session, [batch])
            eta = _eta(deps, tenant_id, tally)  # a look at a queue with these rows would be a scan
            return BatchView.of(batch, counts, eta).model_dump_json()

        answer = idempotency.once(session, tenant_id, key, request=asked, act=act)
        fault_points.fault_point("before-submit-commit")
    fault_points.fault_point("after-submit-commit")
    return answer


@router.get("", responses=documented(HTTPStatus.UNPROCESSABLE_ENTITY))
def list_batches(
    tenant_id: TenantId,
    deps: Deps,
    status: BatchStatus | None = None,
    label: Annotated[Label | None, Query()] = None,
    limit: Limit = 20,
    cursor: Cursor = None,
) -> Page[BatchView]:
    """Newest first."""
    with deps.sessions.begin() as session:
        found = batches.page(
            session, tenant_id, limit=limit + 1, after=cursor, status=status, label=label
        )
        views = deps.batch_views(session, found[:limit])
    return Page(data=views, next_cursor=views[-1].id if len(found) > limit else None)


@router.get("/{batch_id}", responses=documented(HTTPStatus.NOT_FOUND))
def show_batch(batch_id: str, tenant_id: TenantId, deps: Deps) -> BatchView:
    """The batch and its counts now."""
    with deps.sessions.begin() as session:
        return deps.batch_view(session, batches.find(session, tenant_id, batch_id))


@router.post("/{batch_id}/cancel", responses=documented(HTTPStatus.NOT_FOUND))
def cancel_batch(batch_id: str, tenant_id: TenantId, deps: Deps) -> BatchView:
    """Its queued jobs end at once, running ones within about a step; what is drawn stays."""
    with deps.sessions.begin() as session:
        view = deps.batch_view(session, lifecycle.cancel_batch(session, tenant_id, batch_id))
    deps.notifier.notify_webhook_senders()
    return view


@router.post("/{batch_id}/pause", responses=documented(HTTPStatus.NOT_FOUND))
def pause_batch(batch_id: str, tenant_id: TenantId, deps: Deps) -> BatchView:
    """Its queued jobs wait until it is resumed; running ones are finished."""
    with deps.sessions.begin() as session:
        return deps.batch_view(session, lifecycle.pause_batch(session, tenant_id, batch_id))


@router.post("/{batch_id}/resume", responses=documented(HTTPStatus.NOT_FOUND))
def resume_batch(batch_id: str, tenant_id: TenantId, deps: Deps) -> BatchView:
    """A paused batch goes on, in the places its jobs had."""
    with deps.sessions.begin() as session:
        view = deps.batch_view(session, lifecycle.resume_batch(session, tenant_id, batch_id))
    deps.notifier.notify_workers()
    return view


@router.post(
    "/{batch_id}/retry",
    status_code=HTTPStatus.ACCEPTED,
    responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
)
def retry_batch(batch_id: str, tenant_id: TenantId, deps: Deps) -> BatchView:
    """A new batch of the failed jobs; asked again without new failures, it is the same one."""
    with deps.sessions.begin() as session:
        view = deps.batch_view(session, lifecycle.retry_batch(session, tenant_id, batch_id))
    deps.notifier.notify_workers()
    return view
