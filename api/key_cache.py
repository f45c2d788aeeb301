"""Cache of valid API keys, so that a request need not ask the database."""

import hashlib
import time
from typing import Final

from darkroom.accounts import api_keys
from darkroom.db.connection import Sessions
from darkroom.db.tables import ApiKey

TRUSTED_S: Final = 0.5  #: a revoked key is refused within a second, by every API process
_CAPACITY: Final = 10_000


class ApiKeyCache:
    """Recently authenticated keys, by the hash of their secret."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._seen: dict[bytes, tuple[float, ApiKey]] = {}

    def recall(self, secret: str) -> ApiKey | None:
        """Return the key if it was valid within `TRUSTED_S`. Does not block."""
        until, key = self._seen.get(_digest(secret), (0.0, None))
        return key if time.monotonic() < until else None

    def find(self, secret: str) -> ApiKey | None:
        """Return the key if it is valid. Asks the database."""
        asked_at = time.monotonic()
        with self._sessions.begin() as session:
            key = api_keys.authenticate(session, secret)
        if key is not None:
            if len(self._seen) >= _CAPACITY:
                self._seen.clear()
            self._seen[_digest(secret)] = (asked_at + TRUSTED_S, key)
        return key


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
