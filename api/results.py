"""Results of a batch as files: streamed, and as the jobs are when they are read."""

from collections.abc import Iterator
from http import HTTPStatus
from itertools import chain
from typing import Any, Final

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from api.dependencies import Dependencies, Deps, TenantId
from api.errors import documented
from api.parameters import BatchId
from darkroom import batches
from darkroom.db.connection import Sessions
from darkroom.db.tables import Batch
from darkroom.imports import rejected_rows
from darkroom.results import manifest, zip_stream
from darkroom.results.manifest import Line

router = APIRouter(prefix="/v1/batches/{batch_id}", tags=["results"])

_BLOCK_BYTES: Final = 2**16
_CSV: Final = "text/csv"
_JSON_LINES: Final = "application/x-ndjson"
_ZIP: Final = "application/zip"


def _responses(media_type: str) -> dict[int | str, dict[str, Any]]:
    schema = {"type": "string", "format": "binary"} if media_type == _ZIP else {"type": "string"}
    ok: dict[int | str, dict[str, Any]] = {
        HTTPStatus.OK.value: {"content": {media_type: {"schema": schema}}}
    }
    return ok | documented(HTTPStatus.NOT_FOUND)


def _batch(sessions: Sessions, tenant_id: str, batch_id: str) -> Batch:
    with sessions.begin() as session:
        return batches.find(session, tenant_id, batch_id)


def _file(pieces: Iterator[bytes], name: str, media_type: str) -> StreamingResponse:
    """Respond after the first piece is read, so that a failure until then is a problem."""
    blocks = _blocks(pieces)
    first = next(blocks)
    headers = {
        "Content-Disposition": f'attachment; filename="{name}"',
        "Cache-Control": "no-store",
    }
    return StreamingResponse(chain([first], blocks), media_type=media_type, headers=headers)


def _blocks(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Join pieces into larger ones: each costs a switch of threads."""
    block = bytearray()
    for piece in pieces:
        block += piece
        if len(block) >= _BLOCK_BYTES:
            yield bytes(block)
            block.clear()
    yield bytes(block)


@router.get(
    "/errors.csv",
    summary="Get the rejected rows",
    response_class=StreamingResponse,
    responses=_responses(_CSV),
)
def get_batch_errors(batch_id: BatchId, tenant_id: TenantId, deps: Deps) -> StreamingResponse:
    """Return the rejected rows as they came, with their problems. Corrected, it can be sent."""
    batch = _batch(deps.sessions, tenant_id, batch_id)
    return _file(rejected_rows.read(deps.sessions, batch.id), f"{batch.id}-errors.csv", _CSV)


def _lines(deps: Dependencies, batch: Batch) -> Iterator[Line]:
    return manifest.lines(deps.sessions, batch, deps.store, url_ttl_s=deps.settings.image_url_ttl_s)


@router.get(
    "/manifest.jsonl",
    summary="Get the manifest as JSON lines",
    response_class=StreamingResponse,
    responses=_responses(_JSON_LINES),
)
def get_batch_manifest_jsonl(
    batch_id: BatchId, tenant_id: TenantId, deps: Deps
) -> StreamingResponse:
    """Return one line for each job as it is now, in the order of the rows, with fresh URLs."""
    batch = _batch(deps.sessions, tenant_id, batch_id)
    pieces = manifest.as_json_lines(_lines(deps, batch))
    return _file(pieces, f"{batch.id}-manifest.jsonl", _JSON_LINES)


@router.get(
    "/manifest.csv",
    summary="Get the manifest as CSV",
    response_class=StreamingResponse,
    responses=_responses(_CSV),
)
def get_batch_manifest_csv(batch_id: BatchId, tenant_id: TenantId, deps: Deps) -> StreamingResponse:
    """Return the manifest as a table. Cells that a spreadsheet would run are escaped."""
    batch = _batch(deps.sessions, tenant_id, batch_id)
    pieces = manifest.as_csv(_lines(deps, batch))
    return _file(pieces, f"{batch.id}-manifest.csv", _CSV)


@router.get(
    "/images.zip",
    summary="Get the images of a batch",
    response_class=StreamingResponse,
    responses=_responses(_ZIP),
)
def get_batch_images(batch_id: BatchId, tenant_id: TenantId, deps: Deps) -> StreamingResponse:
    """Return the images so far as a ZIP file, named as in the manifest."""
    batch = _batch(deps.sessions, tenant_id, batch_id)
    pieces = zip_stream.as_zip(deps.sessions, batch, deps.store)
    return _file(pieces, f"{batch.id}-images.zip", _ZIP)
