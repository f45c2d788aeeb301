"""Idempotency-Key: what the header may be, and how an answer to it is sent."""

from http import HTTPStatus
from typing import Annotated

from fastapi import Header, Response

from darkroom.idempotency import StoredResponse

Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="Yours, unique to this request: sent again within 24 hours, it is answered "
        "as the first time (200, `Idempotency-Replayed: true`) and nothing is created.",
    ),
]


def respond(answer: StoredResponse) -> Response:
    """202 for the first time, 200 for every other; the same body."""
    return Response(
        answer.body,
        HTTPStatus.OK if answer.replayed else HTTPStatus.ACCEPTED,
        headers={"Idempotency-Replayed": "true"} if answer.replayed else {},
        media_type="application/json",
    )
