"""Receives a file of rows, as the body or as a part of a form, and keeps it on disk."""

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from tempfile import SpooledTemporaryFile
from typing import IO, Final

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from api.errors import ProblemException
from darkroom.imports.formats import format_of_body, format_of_file
from darkroom.media_types import MEDIA_TYPES, Format

_IN_MEMORY_BYTES: Final = 2**20  # larger files go to disk during the upload
_ENVELOPE_BYTES: Final = 2**16  # of a multipart body, besides the file
_FORM: Final = "multipart/form-data"


@dataclass(frozen=True)
class Upload:
    """File at its beginning, its format, and its SHA-256."""

    file: IO[bytes]
    kind: Format
    digest: bytes


@asynccontextmanager
async def received(request: Request, *, max_bytes: int) -> AsyncIterator[Upload]:
    """Yield the request's file. Raise ProblemException for another type or a larger file."""
    content_type = request.headers.get("content-type", "")
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        detail = f"Content-Encoding {encoding[:32]!r} is not supported; send the file uncompressed"
        raise ProblemException(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", detail)
    if content_type.partition(";")[0].strip().lower() == _FORM:
        async with _from_form(request, max_bytes) as upload:
            yield upload
        return
    kind = format_of_body(content_type)
    if kind is None:
        detail = (
            f"Content-Type {content_type[:64]!r} is not supported; send the file as the body with "
            f"{', '.join(MEDIA_TYPES)}, or as the part file of {_FORM}"
        )
        raise ProblemException(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", detail)
    with SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES) as file:
        digest = hashlib.sha256()
        async for chunk in _counted(request, max_bytes):
            digest.update(chunk)
            file.write(chunk)
        file.seek(0)
        yield Upload(file, kind, digest.digest())


async def _counted(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """Yield the body as it arrives, up to the limit. Raise ProblemException beyond it."""
    announced = request.headers.get("content-length", "0")
    seen = int(announced) if announced.isdecimal() else 0
    if seen <= max_bytes:
        seen = 0
        async for chunk in request.stream():
            seen += len(chunk)
            if seen > max_bytes:
                break
            yield chunk
    if seen > max_bytes:
        detail = f"the file is larger than {max_bytes:,} bytes; split it into several batches"
        raise ProblemException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", detail)


@asynccontextmanager
async def _from_form(request: Request, max_bytes: int) -> AsyncIterator[Upload]:
    parser = MultiPartParser(
        request.headers,
        _counted(request, max_bytes + _ENVELOPE_BYTES),
        max_files=1,
        max_fields=8,
        max_part_size=2**10,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        detail = f"the form is malformed: {error.message[:200]}"
        raise ProblemException(HTTPStatus.BAD_REQUEST, "malformed_form", detail) from error
    try:
        file = form.get("file")
        if list(form.keys()) != ["file"] or not isinstance(file, UploadFile):
            detail = "the form must have exactly the part file; send options in the query"
            raise ProblemException(HTTPStatus.UNPROCESSABLE_ENTITY, "malformed_form", detail)
        kind = format_of_file(file.filename or "", file.content_type or "")
        digest = await run_in_threadpool(hashlib.file_digest, file.file, "sha256")  # type: ignore[arg-type]
        await file.seek(0)
        yield Upload(file.file, kind, digest.digest())
    finally:
        await form.close()
