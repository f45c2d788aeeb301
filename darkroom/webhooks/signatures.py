"""Webhook signatures as https://www.standardwebhooks.com defines them."""

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from darkroom.errors import SetupError

_SECRET: Final = "whsec_"  # noqa: S105  # a prefix that scanners know
_PRIVATE: Final = "whsk_"
_PUBLIC: Final = "whpk_"
_SECRET_BYTES: Final = 32
_SEED_BYTES: Final = 32


def new_secret() -> str:
    """Return a new random secret to share with the receiver."""
    return _SECRET + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def headers(
    message_id: str,
    timestamp: int,
    body: bytes,
    *,
    shared: Sequence[str],
    private: Sequence[Ed25519PrivateKey] = (),
) -> dict[str, str]:
    """Return the three headers, with one signature per key: during a rotation there are several.

    `timestamp`: Unix time of this attempt; receivers reject what is minutes off.
    """
    content = f"{message_id}.{timestamp}.".encode() + body
    signatures = [f"v1,{_base64(_hmac(secret, content))}" for secret in shared]
    signatures += [f"v1a,{_base64(key.sign(content))}" for key in private]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signatures),
    }


def _hmac(secret: str, content: bytes) -> bytes:
    return hmac.digest(base64.b64decode(secret.removeprefix(_SECRET)), content, hashlib.sha256)


def _base64(signature: bytes) -> str:
    return base64.b64encode(signature).decode()


def private_keys(text: str) -> list[Ed25519PrivateKey]:
    """Parse comma-separated `whsk_…` keys, the newest first. Raise SetupError."""
    return [_private_key(each) for each in text.replace(",", " ").split()]


def _private_key(text: str) -> Ed25519PrivateKey:
    try:
        raw = base64.b64decode(text.removeprefix(_PRIVATE), validate=True)
    except binascii.Error as error:
        raise _invalid_key() from error
    if not text.startswith(_PRIVATE) or len(raw) not in {_SEED_BYTES, 2 * _SEED_BYTES}:
        raise _invalid_key()
    return Ed25519PrivateKey.from_private_bytes(raw[:_SEED_BYTES])  # the rest is the public half


def _invalid_key() -> SetupError:
    return SetupError(
        "DARKROOM_WEBHOOK_SIGNING_KEY must be `whsk_` and an ed25519 key in base64; "
        "create one with `darkroom webhooks generate-key`"
    )


def new_private_key() -> str:
    """Return a new value for DARKROOM_WEBHOOK_SIGNING_KEY."""
    return _PRIVATE + _base64(secrets.token_bytes(_SEED_BYTES))


def public_key(private: Ed25519PrivateKey) -> str:
    """Return the `whpk_…` key with which receivers verify `v1a` signatures."""
    return _PUBLIC + _base64(private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))
