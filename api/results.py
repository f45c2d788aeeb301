"""What a batch has become, as files: streamed, and true at the moment of reading."""

from collections.abc import Iterator
from http import HTTPStatus
from itertools import chain
from typing import Any, Final

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from api.dependencies import Dependencies, Deps, TenantId
from api.errors import documented
from darkroom import batches
from darkroom.db.tables import Batch
from darkroom.imports import rejected_rows
from darkroom.results import manifest, zip_stream
from darkroom.results.manifest import Line

router = APIRouter(prefix="/v1/batches/{batch_id}", tags=["batches"])

_BLOCK_BYTES: Final = 2**16
_CSV: Final = "text/csv"
_JSON_LINES: Final = "application/x-ndjson"
_ZIP: Final = "application/zip"


def _answers(media_type: str) -> dict[int | str, dict[str, Any]]:
    ok: dict[int | str, dict[str, Any]] = {HTTPStatus.OK.value: {"content": {media_type: {}}}}
    return ok | documented(HTTPStatus.NOT_FOUND)


def _batch(deps: Dependencies, tenant_id: str, batch_id: str) -> Batch:
    with deps.sessions.begin() as session:
        return batches.find(session, tenant_id, batch_id)


def _file(pieces: Iterator[bytes], name: str, media_type: str) -> StreamingResponse:
    """The first piece is read before anything is answered: what fails then is still a problem."""
    blocks = _blocks(pieces)
    first = next(blocks)
    headers = {
        "Content-Disposition": f'attachment; filename="{name}"',
        "Cache-Control": "no-store",
    }
    return StreamingResponse(chain([first], blocks), media_type=media_type, headers=headers)


def _blocks(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same in larger pieces: each costs a change of threads."""
    block = bytearray()
    for piece in pieces:
        block += piece
        if len(block) >= _BLOCK_BYTES:
            yield bytes(block)
            block.clear()
    yield bytes(block)


@router.get("/errors.csv", response_class=StreamingResponse, responses=_answers(_CSV))
def show_errors(batch_id: str, tenant_id: TenantId, deps: Deps) -> StreamingResponse:
    """The rows that were rejected as they came, and why; mended, it can be sent as it is."""
    batch = _batch(deps, tenant_id, batch_id)
    return _file(rejected_rows.read(deps.sessions, batch.id), f"{batch.id}-errors.csv", _CSV)


def _lines(deps: Dependencies, batch: Batch) -> Iterator[Line]:
    return manifest.lines(deps.sessions, batch, deps.store, url_ttl_s=deps.settings.image_url_ttl_s)


@router.get("/manifest.jsonl", response_class=StreamingResponse, responses=_answers(_JSON_LINES))
def show_manifest_lines(batch_id: str, tenant_id: TenantId, deps: Deps) -> StreamingResponse:
    """A line for each job as it is now, in the order of the rows; image URLs are fresh."""
    batch = _batch(deps, tenant_id, batch_id)
    pieces = manifest.as_json_lines(_lines(deps, batch))
    return _file(pieces, f"{batch.id}-manifest.jsonl", _JSON_LINES)


@router.get("/manifest.csv", response_class=StreamingResponse, responses=_answers(_CSV))
def show_manifest_table(batch_id: str, tenant_id: TenantId, deps: Deps) -> StreamingResponse:
    """The same as a table; cells that a spreadsheet would run as formulas are escaped."""
    batch = _batch(deps, tenant_id, batch_id)
    pieces = manifest.as_csv(_lines(deps, batch))
    return _file(pieces, f"{batch.id}-manifest.csv", _CSV)


@router.get("/images.zip", response_class=StreamingResponse, responses=_answers(_ZIP))
def show_images(batch_id: str, tenant_id: TenantId, deps: Deps) -> StreamingResponse:
    """The pictures drawn so far, named as in the manifest."""
    batch = _batch(deps, tenant_id, batch_id)
    pieces = zip_stream.as_zip(deps.sessions, batch, deps.store)
    return _file(pieces, f"{batch.id}-images.zip", _ZIP)
