"""Idempotency-Key: the header's form, and the response to a repeated request."""

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
        description="Your own key, unique to this request. A repeated request within 24 hours "
        "creates nothing and returns the first response (200, `Idempotency-Replayed: true`).",
    ),
]


def respond(stored: StoredResponse) -> Response:
    """Respond 202 to the first request and 200 to a repeated one, with the same body."""
    return Response(
        stored.body,
        HTTPStatus.OK if stored.replayed else HTTPStatus.ACCEPTED,
        headers={"Idempotency-Replayed": "true"} if stored.replayed else {},
        media_type="application/json",
    )
