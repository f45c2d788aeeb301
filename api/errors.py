"""Errors as RFC 9457 problems: one table from exceptions to status and code."""

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, ValidationError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from api.schemas.common import Moment, ProblemItem
from darkroom.db.connection import is_unavailable
from darkroom.errors import (
    DarkroomError,
    Deleted,
    Draining,
    ImageNotReady,
    InputProblem,
    InvalidInput,
    JobNotFinished,
    NotFound,
    NothingToRetry,
    Overloaded,
    StorageUnavailable,
)
from darkroom.generation.validation import input_problems, problems_of
from darkroom.idempotency import IdempotencyKeyReused
from darkroom.imports.formats import UnsupportedFile
from darkroom.webhooks.endpoints import EndpointDisabled, TooManyEndpoints

PROBLEM_JSON: Final = "application/problem+json"
RETRY_AFTER_S: Final = 5

logger = logging.getLogger(__name__)


class Problem(BaseModel):
    """Problem details (RFC 9457)."""

    type: str = Field("about:blank", description="Always `about:blank`; `code` tells problems.")
    title: str = Field(description="The HTTP status in words.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What is wrong and what to do, for people.")
    code: str = Field(description="Stable name of the problem, in snake_case.")
    errors: list[ProblemItem] | None = Field(
        None, description="With `invalid_input`: every problem, or the first 10,000 of a file."
    )
    error_count: int | None = Field(None, description="With `invalid_input`: number of problems.")
    id: str | None = Field(None, description="With 410: what was deleted.")
    deleted_at: Moment | None = Field(None, description="With 410: when it was deleted.")


_CODES: Final[dict[type[DarkroomError], tuple[HTTPStatus, str]]] = {
    NotFound: (HTTPStatus.NOT_FOUND, "not_found"),
    JobNotFinished: (HTTPStatus.CONFLICT, "job_not_finished"),
    NothingToRetry: (HTTPStatus.CONFLICT, "nothing_to_retry"),
    ImageNotReady: (HTTPStatus.CONFLICT, "image_not_ready"),
    Overloaded: (HTTPStatus.SERVICE_UNAVAILABLE, "overloaded"),
    Draining: (HTTPStatus.SERVICE_UNAVAILABLE, "draining"),
    StorageUnavailable: (HTTPStatus.SERVICE_UNAVAILABLE, "storage_unavailable"),
    IdempotencyKeyReused: (HTTPStatus.CONFLICT, "idempotency_key_reused"),
    TooManyEndpoints: (HTTPStatus.CONFLICT, "too_many_webhooks"),
    EndpointDisabled: (HTTPStatus.CONFLICT, "webhook_disabled"),
    UnsupportedFile: (HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type"),
}


class ProblemException(Exception):
    """Request that the HTTP layer refuses, such as one of a wrong type, too large, or keyless."""

    def __init__(self, status: HTTPStatus, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail


def problem(
    status: int,
    code: str,
    detail: str,
    *,
    errors: Sequence[InputProblem] | None = None,
    error_count: int | None = None,
    headers: Mapping[str, str] | None = None,
    tombstone: Deleted | None = None,
) -> JSONResponse:
    """Return a problem+json response; 429 and 503 say when to try again."""
    body = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code,
        errors=None if errors is None else [ProblemItem.of(error) for error in errors],
        error_count=error_count,
        id=tombstone and tombstone.object_id,
        deleted_at=tombstone and tombstone.deleted_at,
    )
    busy = status in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}
    retry = {"Retry-After": str(RETRY_AFTER_S)} if busy else {}
    return JSONResponse(
        body.model_dump(exclude_none=True),
        status_code=status,
        headers={**retry, **(headers or {})},
        media_type=PROBLEM_JSON,
    )


def install(app: FastAPI) -> None:
    """Turn every error of the app into a problem, the router's own 404 and 405 included."""
    app.add_exception_handler(InvalidInput, _invalid_input)
    app.add_exception_handler(ValidationError, _invalid_model)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(Deleted, _deleted)
    app.add_exception_handler(DarkroomError, _known)
    app.add_exception_handler(ProblemException, _problem)
    app.add_exception_handler(DBAPIError, _database)
    app.add_exception_handler(PoolTimeout, _no_database)
    app.add_exception_handler(HTTPException, _router)
    app.add_exception_handler(ClientDisconnect, _disconnected)
    app.add_exception_handler(Exception, _bug)


def _invalid(problems: Sequence[InputProblem], total: int | None = None) -> JSONResponse:
    count = len(problems) if total is None else total
    first = problems[0]
    where = ".".join(str(part) for part in first.loc)
    rest = f" (and {count - 1:,} more)" if count > 1 else ""
    return problem(
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "invalid_input",
        f"{where}: {first.message}{rest}; nothing was created",
        errors=problems,
        error_count=count,
    )


async def _invalid_input(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, InvalidInput)
    return _invalid(error.problems, error.total)


async def _invalid_model(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ValidationError)
    return _invalid(input_problems(error))


async def _invalid_request(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _invalid(problems_of(error.errors()))


async def _deleted(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Deleted)
    return problem(HTTPStatus.GONE, "deleted", str(error), tombstone=error)


async def _known(_: Request, error: Exception) -> JSONResponse:
    status, code = _CODES.get(type(error), (HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error"))  # type: ignore[arg-type]
    return problem(status, code, str(error))


async def _problem(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ProblemException)
    challenge = {"WWW-Authenticate": "Bearer"} if error.status == HTTPStatus.UNAUTHORIZED else {}
    return problem(error.status, error.code, error.detail, headers=challenge)


async def _database(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, DBAPIError)
    if is_unavailable(error):
        return await _no_database(request, error)
    return await _bug(request, error)


async def _no_database(_: Request, error: Exception) -> JSONResponse:
    logger.warning("database unavailable: %s; answering 503", type(error).__name__)
    detail = "the database cannot be reached and nothing was accepted; try again"
    return problem(HTTPStatus.SERVICE_UNAVAILABLE, "database_unavailable", detail)


async def _router(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = HTTPStatus(error.status_code).name.lower()
    return problem(error.status_code, code, str(error.detail), headers=error.headers)


async def _disconnected(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ClientDisconnect)
    return problem(
        HTTPStatus.BAD_REQUEST,
        "client_disconnected",
        "the client disconnected before the request body was complete",
    )


async def _bug(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    detail = "the server failed to handle the request; its log has the traceback"
    return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", detail)


def documented(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    """Return the `responses=` of a route that may answer with these problems, or 503."""
    return {
        status.value: {
            "description": status.phrase,
            "content": {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in (*statuses, HTTPStatus.SERVICE_UNAVAILABLE)
    }
