"""/v1/batches: a file of rows becomes a batch of jobs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Annotated, Final, TypeAlias, TypeVar

import anyio.to_thread
from anyio import CapacityLimiter
from fastapi import APIRouter, Depends, Query, Request, Response
from sqlalchemy.orm import Session

from api.dependencies import Dependencies, Deps, TenantId
from api.errors import documented
from api.idempotency import Key, respond
from api.parameters import BatchId, Cursor, Limit, next_cursor
from api.rendering import render_batch, render_batches
from api.schemas.batches import Batch, BatchList, DryRun
from api.snapshot_cache import SnapshotCache
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
from darkroom.settings import Settings
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
            "description": f"Default of the column `{name}` for rows that leave it empty.",
            "schema": {"type": "string"},
        }
        for name in row_validator.DEFAULTS
    ],
}


@dataclass(frozen=True)
class BatchOptions:
    """Query parameters that apply to the batch as a whole."""

    label: Annotated[
        Label | None,
        Query(description="Your own label, returned with the batch and usable as a list filter."),
    ] = None
    on_error: Annotated[
        OnError,
        Query(
            description="`reject`: a file with a bad row creates nothing. `skip`: the good rows "
            "become jobs."
        ),
    ] = OnError.REJECT
    dry_run: Annotated[
        bool, Query(description="Only check the file and return the result; create nothing.")
    ] = False
    expand: Annotated[
        Expand | None,
        Query(
            description="Expand each row into a parameter sweep: `{a|b}` in prompts and `4|8` in "
            "numbers are choices. `product` combines each with each, `zip` the first with the "
            "first and so on."
        ),
    ] = None
    webhook_url: Annotated[
        WebhookUrl | None,
        Query(
            description="URL that receives `batch.completed` or `batch.canceled`, signed with the "
            "secret of GET /v1/webhook-secret."
        ),
    ] = None
    retention_days: Annotated[
        int | None,
        Query(
            ge=1,
            le=36_500,
            description="Days after which images and prompts are deleted. Default: the tenant's.",
        ),
    ] = None


Result = TypeVar("Result")
_Options: TypeAlias = Annotated[BatchOptions, Depends()]
_OPTION_NAMES: Final = frozenset(BatchOptions.__dataclass_fields__)


@router.post(
    "",
    summary="Submit a batch",
    status_code=HTTPStatus.ACCEPTED,
    response_model=Batch,
    openapi_extra=_OPENAPI,
    responses={
        HTTPStatus.OK.value: {
            "model": Batch | DryRun,
            "description": "Repeated request or dry run; nothing was created",
        },
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
    """Queue the rows of a file: all of them, or with `on_error=reject` none if one is bad.

    Send the file as the body or as the part `file` of a form. A query parameter with the name of a
    column is the default of that column.
    """
    endpoints.check_own_url(options.webhook_url, deps.url_policy, loc=("query", "webhook_url"))
    import_options = _import_options(request, deps, options)
    async with received(request, max_bytes=deps.settings.max_upload_bytes) as upload:
        if options.dry_run:
            check = partial(_dry_run, deps, tenant_id, upload, import_options)
            return await _limited(deps.import_limiter, check)
        asked = b"\0".join((b"batch", upload.digest, upload.kind.encode(), _query(request)))
        submit = partial(_submit, deps, tenant_id, upload, import_options, options, key, asked)
        stored = await _limited(
            deps.import_limiter, partial(retry_on_serialization_failure, submit)
        )
    deps.notifier.notify_workers()
    return respond(stored)


def _import_options(request: Request, deps: Dependencies, options: BatchOptions) -> ImportOptions:
    given = [item for item in request.query_params.multi_items() if item[0] not in _OPTION_NAMES]
    defaults = row_validator.read_defaults(given, lists=options.expand is not None)
    return ImportOptions(deps.registry, deps.url_policy, defaults, options.expand)


def _query(request: Request) -> bytes:
    """Return the whole query in one order."""
    return repr(sorted(request.query_params.multi_items())).encode()


async def _limited(limiter: CapacityLimiter, work: Callable[[], Result]) -> Result:
    """Run an import in a thread, few at a time: each takes a core from all other requests."""
    return await anyio.to_thread.run_sync(work, limiter=limiter)


def _limits(settings: Settings) -> Limits:
    return Limits(settings.max_upload_rows, settings.max_batch_jobs)


def _dry_run(
    deps: Dependencies, tenant_id: str, upload: Upload, options: ImportOptions
) -> Response:
    table = formats.read_table(upload.file, upload.kind, lists=options.expand is not None)
    summary = importer.check(table, options, limits=_limits(deps.settings))
    result = DryRun.of(summary, _eta(deps.snapshot_cache, tenant_id, summary))
    return Response(result.model_dump_json(), media_type="application/json")


def _eta(cache: SnapshotCache, tenant_id: str, summary: ImportSummary) -> Eta | None:
    """Return the ETA of a file's jobs, computed as if behind the queue of the snapshot."""
    snapshot = cache.now()
    return None if snapshot is None else snapshot.of_more(tenant_id, Priority.BULK, summary.cost)


def _submit(
    deps: Dependencies,
    tenant_id: str,
    upload: Upload,
    import_options: ImportOptions,
    options: BatchOptions,
    key: str | None,
    asked: bytes,
) -> StoredResponse:
    with deps.sessions.begin() as session:
        act = partial(_create, deps, session, tenant_id, upload, import_options, options)
        stored = idempotency.once(session, tenant_id, key, request=asked, act=act)
        fault_points.fault_point("before-submit-commit")
    fault_points.fault_point("after-submit-commit")
    return stored


def _create(
    deps: Dependencies,
    session: Session,
    tenant_id: str,
    upload: Upload,
    import_options: ImportOptions,
    options: BatchOptions,
) -> str:
    """Create the batch and its jobs, and return its JSON."""
    table = formats.read_table(upload.file, upload.kind, lists=import_options.expand is not None)
    batch = batches.create(
        session,
        tenant_id,
        label=options.label,
        webhook_url=options.webhook_url,
        retention_days=options.retention_days,
    )
    limits = _limits(deps.settings)
    summary = importer.load(
        session, batch, table, import_options, on_error=options.on_error, limits=limits
    )
    [counts] = batches.count(session, [batch])
    # From the shared snapshot: one that includes these rows would take a scan of them.
    eta = _eta(deps.snapshot_cache, tenant_id, summary)
    return Batch.of(batch, counts, eta).model_dump_json()


@router.get("", summary="List batches", responses=documented(HTTPStatus.UNPROCESSABLE_ENTITY))
def list_batches(
    tenant_id: TenantId,
    deps: Deps,
    status: Annotated[
        BatchStatus | None, Query(description="Only batches with this status.")
    ] = None,
    label: Annotated[Label | None, Query(description="Only batches with this label.")] = None,
    limit: Limit = 20,
    cursor: Cursor = None,
) -> BatchList:
    """Return batches, newest first."""
    with deps.sessions.begin() as session:
        found = batches.page(
            session, tenant_id, limit=limit + 1, after=cursor, status=status, label=label
        )
        page = render_batches(deps, session, found[:limit])
    return BatchList(data=page, next_cursor=next_cursor(found, limit))


@router.get("/{batch_id}", summary="Get a batch", responses=documented(HTTPStatus.NOT_FOUND))
def get_batch(batch_id: BatchId, tenant_id: TenantId, deps: Deps) -> Batch:
    """Return the batch with its present counts."""
    with deps.sessions.begin() as session:
        return render_batch(deps, session, batches.find(session, tenant_id, batch_id))


@router.post(
    "/{batch_id}/cancel", summary="Cancel a batch", responses=documented(HTTPStatus.NOT_FOUND)
)
def cancel_batch(batch_id: BatchId, tenant_id: TenantId, deps: Deps) -> Batch:
    """Cancel queued jobs at once, running ones within about a step. Finished images stay."""
    with deps.sessions.begin() as session:
        canceled = lifecycle.cancel_batch(session, tenant_id, batch_id)
        batch = render_batch(deps, session, canceled)
    deps.notifier.notify_webhook_senders()
    return batch


@router.post(
    "/{batch_id}/pause", summary="Pause a batch", responses=documented(HTTPStatus.NOT_FOUND)
)
def pause_batch(batch_id: BatchId, tenant_id: TenantId, deps: Deps) -> Batch:
    """Keep queued jobs from workers until the batch is resumed. Running jobs are finished."""
    with deps.sessions.begin() as session:
        return render_batch(deps, session, lifecycle.pause_batch(session, tenant_id, batch_id))


@router.post(
    "/{batch_id}/resume", summary="Resume a batch", responses=documented(HTTPStatus.NOT_FOUND)
)
def resume_batch(batch_id: BatchId, tenant_id: TenantId, deps: Deps) -> Batch:
    """End the pause of a batch. Its jobs keep their queue positions."""
    with deps.sessions.begin() as session:
        resumed = lifecycle.resume_batch(session, tenant_id, batch_id)
        batch = render_batch(deps, session, resumed)
    deps.notifier.notify_workers()
    return batch


@router.post(
    "/{batch_id}/retry",
    summary="Retry a batch",
    status_code=HTTPStatus.ACCEPTED,
    responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
)
def retry_batch(batch_id: BatchId, tenant_id: TenantId, deps: Deps) -> Batch:
    """Submit the failed jobs as a new batch. A second retry without new failures returns it."""
    with deps.sessions.begin() as session:
        retried = lifecycle.retry_batch(session, tenant_id, batch_id)
        batch = render_batch(deps, session, retried)
    deps.notifier.notify_workers()
    return batch
