"""What a batch has become, as files: streamed, and true at the moment of reading."""

from collections.abc import Iterator
from http import HTTPStatus

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from api.errors import documented
from api.tools import TenantId, Uses
from darkroom import batches, rejected

router = APIRouter(prefix="/v1/batches/{batch_id}", tags=["batches"])


def _file(pieces: Iterator[bytes], name: str, media_type: str) -> StreamingResponse:
    headers = {
        "Content-Disposition": f'attachment; filename="{name}"',
        "Cache-Control": "no-store",
    }
    return StreamingResponse(pieces, media_type=media_type, headers=headers)


@router.get(
    "/errors.csv",
    response_class=StreamingResponse,
    responses={
        HTTPStatus.OK.value: {"content": {"text/csv": {}}},
        **documented(HTTPStatus.NOT_FOUND),
    },
)
def show_errors(batch_id: str, tenant_id: TenantId, use: Uses) -> StreamingResponse:
    """The rows that were rejected as they came, and why; mended, it can be sent as it is."""
    with use.sessions.begin() as session:
        batch = batches.find(session, tenant_id, batch_id)
    return _file(rejected.read(use.sessions, batch.id), f"{batch.id}-errors.csv", "text/csv")
