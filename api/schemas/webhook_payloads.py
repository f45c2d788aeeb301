"""Webhooks in the OpenAPI document: one operation for each event type."""

from typing import Annotated

from fastapi import APIRouter, Header

from darkroom.webhooks.payload_models import MESSAGES

_Id = Annotated[str, Header(description="Message id; the same in every attempt and replay.")]
_Timestamp = Annotated[int, Header(description="Unix time of this attempt, in seconds.")]
_Signature = Annotated[
    str,
    Header(
        description="Space-separated signatures: `v1,…` (HMAC with the shared secret) and, if the "
        "server has a key pair, `v1a,…` (ed25519)."
    ),
]


def document(webhooks: APIRouter) -> None:
    """Add an operation for each event type, with the headers and the body of its webhook."""
    for event_type, message in MESSAGES.items():

        def receive(
            body: message,  # type: ignore[valid-type]
            webhook_id: _Id,
            webhook_timestamp: _Timestamp,
            webhook_signature: _Signature,
        ) -> None:
            """Verify the signature of the raw body, answer 2xx soon, do the work later."""

        receive.__name__ = f"on_{event_type.replace('.', '_')}"
        webhooks.post(event_type.value, summary=event_type.value, tags=["webhooks"])(receive)
