"""Secrets that we must be able to read again, at rest: sealed with a key that is not in there.

A signing secret cannot be kept as a hash. Sealed, a copy of the database forges nothing.
"""

import base64
import hashlib
from typing import Final

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from darkroom.errors import SetupError

_ENCRYPTED: Final = "sealed:"
_PLAIN: Final = "open:"


class SecretBox:
    """Seals with the first of the keys, opens with any: so a key is replaced by adding one.

    Without a key texts are kept as they are, marked so; they stay readable once there is one.
    """

    def __init__(self, keys: str) -> None:
        """`keys`: separated by commas; each any long random text."""
        self._fernets = [Fernet(_key_of(key)) for key in keys.replace(",", " ").split()]

    def close(self, text: str) -> str:
        """What may be stored."""
        if not self._fernets:
            return _PLAIN + text
        return _ENCRYPTED + MultiFernet(self._fernets).encrypt(text.encode()).decode()

    def open(self, stored: str) -> str:
        """The text again. Raises SetupError when none of the keys sealed it."""
        if stored.startswith(_PLAIN):
            return stored.removeprefix(_PLAIN)
        try:
            if self._fernets:
                token = stored.removeprefix(_ENCRYPTED).encode()
                return MultiFernet(self._fernets).decrypt(token).decode()
        except InvalidToken:
            pass
        raise SetupError(
            "a webhook secret is encrypted with a key that is not in "
            "DARKROOM_WEBHOOK_ENCRYPTION_KEYS; append the old key there, after a comma"
        )


def _key_of(text: str) -> bytes:
    digest = hashlib.sha256(b"darkroom webhook secrets\0" + text.encode()).digest()
    return base64.urlsafe_b64encode(digest)
