"""/v1/batches: a file of rows in, a batch of jobs out."""

import hashlib
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from tempfile import SpooledTemporaryFile
from typing import IO, Annotated, Final, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from api.errors import Refused, documented
from api.jobs import Cursor, Limit
from api.repeats import Key, respond
from api.resources import BatchView, Page
from api.tools import TenantId, Tools, Uses
from darkroom import batches, faults, idempotency, jobs, rows, webhooks
from darkroom.idempotency import Answer
from darkroom.params import Label, WebhookUrl
from darkroom.tables import Batch

_IN_MEMORY_BYTES: Final = 2**20  # larger files go to disk while they come in

router = APIRouter(prefix="/v1/batches", tags=["batches"])

_CSV_BODY: Final = {
    "requestBody": {
        "required": True,
        "content": {"text/csv": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post(
    "",
    status_code=HTTPStatus.ACCEPTED,
    response_model=BatchView,
    openapi_extra=_CSV_BODY,
    responses=documented(
        HTTPStatus.CONFLICT,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        HTTPStatus.UNPROCESSABLE_ENTITY,
    ),
)
async def create_batch(
    request: Request,
    tenant_id: TenantId,
    use: Uses,
    label: Annotated[Label | None, Query(description="Yours, to find the batch again.")] = None,
    _on_error: Annotated[
        Literal["reject"],
        Query(alias="on_error", description="One bad row and nothing is created."),
    ] = "reject",
    webhook_url: Annotated[
        WebhookUrl | None, Query(description="POSTed to when the batch has ended.")
    ] = None,
    key: Key = None,
) -> Response:
    """Queue a CSV file's rows: all of them, or none and a list of what is wrong."""
    webhooks.vet_own_url(webhook_url, use.policy, loc=("query", "webhook_url"))
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "text/csv":
        detail = "send the file as the body, with Content-Type: text/csv"
        raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "not_csv", detail)
    with SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES) as file:
        digest = await _receive(request, file, max_bytes=use.settings.max_csv_bytes)
        asked = b"batch " + digest + repr((label, webhook_url)).encode()
        create = partial(batches.create, label=label, webhook_url=webhook_url)
        answer = await run_in_threadpool(_submit, use, tenant_id, file, create, key, asked)
    use.bell.ring()
    return respond(answer)


async def _receive(request: Request, file: IO[bytes], *, max_bytes: int) -> bytes:
    """Keep the body in `file`, rewound; its SHA-256."""
    received = 0
    digest = hashlib.sha256()
    async for chunk in request.stream():
        received += len(chunk)
        if received > max_bytes:
            detail = f"the file is larger than {max_bytes:,} bytes; send it in parts"
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", detail)
        digest.update(chunk)
        file.write(chunk)
    file.seek(0)
    return digest.digest()


def _submit(
    use: Tools,
    tenant_id: str,
    file: IO[bytes],
    create: Callable[..., Batch],
    key: str | None,
    asked: bytes,
) -> Answer:
    submissions = rows.read_csv(file, use.catalogue, max_rows=use.settings.max_csv_rows)
    webhooks.vet_own_urls(submissions, use.policy)
    with use.sessions.begin() as session:

        def act() -> str:
            batch = create(session, tenant_id, total=len(submissions))
            jobs.submit(session, tenant_id, submissions, batch_id=batch.id)
            return BatchView.of(batch, batches.count(session, [batch])[0]).model_dump_json()

        answer = idempotency.once(session, tenant_id, key, request=asked, act=act)
        faults.reach("before-submit-commit")
    faults.reach("after-submit-commit")
    return answer


@router.get("")
def list_batches(
    tenant_id: TenantId, use: Uses, limit: Limit = 20, cursor: Cursor = None
) -> Page[BatchView]:
    """Newest first."""
    with use.sessions.begin() as session:
        found = batches.page(session, tenant_id, limit=limit + 1, after=cursor)
        counts = batches.count(session, found[:limit])
    views = [BatchView.of(*pair) for pair in zip(found, counts, strict=False)]
    return Page(data=views, next_cursor=views[-1].id if len(found) > limit else None)


@router.get("/{batch_id}", responses=documented(HTTPStatus.NOT_FOUND))
def show_batch(batch_id: str, tenant_id: TenantId, use: Uses) -> BatchView:
    """The batch and its counts now."""
    with use.sessions.begin() as session:
        batch = batches.find(session, tenant_id, batch_id)
        return BatchView.of(batch, batches.count(session, [batch])[0])
