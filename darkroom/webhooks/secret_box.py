"""Encryption of stored signing secrets with keys that are not in the database.

A signing secret cannot be stored as a hash. Encrypted, a copy of the database signs nothing.
"""

import base64
import hashlib
from typing import Final

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from darkroom.errors import SetupError

_ENCRYPTED: Final = "sealed:"  # both prefixes are stored in existing rows
_PLAIN: Final = "open:"


class SecretBox:
    """Box that encrypts with its first key and decrypts with any: add a key to rotate keys.

    Without a key it stores texts in plain, marked as such; they stay readable once there is one.
    """

    def __init__(self, keys: str) -> None:
        """Derive the keys from a comma-separated list of long random texts."""
        self._fernets = [Fernet(_derive_key(key)) for key in keys.replace(",", " ").split()]

    def encrypt(self, text: str) -> str:
        """Return what to store."""
        if not self._fernets:
            return _PLAIN + text
        return _ENCRYPTED + MultiFernet(self._fernets).encrypt(text.encode()).decode()

    def decrypt(self, stored: str) -> str:
        """Return the text of `encrypt`. Raise SetupError when it was another key's."""
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


def _derive_key(text: str) -> bytes:
    digest = hashlib.sha256(b"darkroom webhook secrets\0" + text.encode()).digest()
    return base64.urlsafe_b64encode(digest)
