"""API keys: created, shown once, stored as a hash."""

import hashlib
import secrets
import string
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from sqlalchemy import func, insert, or_, select, update
from sqlalchemy.orm import Session

from darkroom.db.tables import ApiKey
from darkroom.errors import NotFound
from darkroom.ids import new_id
from darkroom.status import Scope

PREFIX: Final = "dk_"
_ALPHABET: Final = string.ascii_letters + string.digits
_RANDOM_CHARS: Final = 32  # 190 bits: a plain hash is enough at rest, no slow one needed
_SHOWN_CHARS: Final = 8


@dataclass(frozen=True)
class NewKey:
    """New key; its secret is not stored."""

    id: str
    secret: str


def create(
    session: Session, tenant_id: str, scopes: Sequence[Scope], *, lifetime: timedelta | None = None
) -> NewKey:
    """Create a key for the tenant; without a lifetime it is valid until it is revoked."""
    secret = _new_secret()
    key_id = new_id("key")
    session.execute(
        insert(ApiKey).values(
            id=key_id,
            tenant_id=tenant_id,
            prefix=secret[: len(PREFIX) + _SHOWN_CHARS],
            sha256=_sha256(secret),
            scopes=[str(scope) for scope in scopes],
            expires_at=None if lifetime is None else func.now() + lifetime,
        )
    )
    return NewKey(key_id, secret)


def authenticate(session: Session, secret: str) -> ApiKey | None:
    """Return the valid key with this secret; found by its hash, so timing reveals nothing."""
    if not _well_formed(secret):
        return None
    return session.scalar(
        select(ApiKey).where(
            ApiKey.sha256 == _sha256(secret),
            ApiKey.revoked_at.is_(None),
            or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > func.now()),
        )
    )


def dead_keys(session: Session, key_ids: Collection[str]) -> frozenset[str]:
    """Return those of the keys that were revoked or have expired."""
    invalid = or_(ApiKey.revoked_at.is_not(None), ApiKey.expires_at <= func.now())
    return frozenset(session.scalars(select(ApiKey.id).where(ApiKey.id.in_(key_ids), invalid)))


def revoke(session: Session, key_id: str) -> None:
    """Revoke the key from the next request on. Raises NotFound."""
    revoked = session.execute(
        update(ApiKey)
        .where(ApiKey.id == key_id)
        .values(revoked_at=func.coalesce(ApiKey.revoked_at, func.now()))
        .returning(ApiKey.id)
    )
    if revoked.first() is None:
        raise NotFound("key", key_id)


def list_all(session: Session) -> Sequence[ApiKey]:
    """Return all keys, oldest first."""
    return session.scalars(select(ApiKey).order_by(ApiKey.id)).all()


def _new_secret() -> str:
    body = "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_CHARS))
    return PREFIX + body + _checksum(body)


def _well_formed(secret: str) -> bool:
    body = secret.removeprefix(PREFIX)
    return secret.startswith(PREFIX) and body.isascii() and _checksum(body[:-6]) == body[-6:]


def _checksum(body: str) -> str:
    """Return a CRC-32 in 6 base-62 digits, by which scanners recognize a key (as GitHub's)."""
    rest, digits = zlib.crc32(body.encode()), ""
    for _ in range(6):
        rest, digit = divmod(rest, len(_ALPHABET))
        digits = _ALPHABET[digit] + digits
    return digits


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
