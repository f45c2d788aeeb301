"""Encryption of stored secrets."""

import pytest

from darkroom.errors import SetupError
from darkroom.webhooks.secret_box import SecretBox


def test_an_encrypted_secret_cannot_be_read_without_its_key():
    encrypted = SecretBox("key").encrypt("whsec_abc")

    assert "abc" not in encrypted
    assert SecretBox("key").decrypt(encrypted) == "whsec_abc"
    for keys in ("", "another"):
        with pytest.raises(SetupError, match="DARKROOM_WEBHOOK_ENCRYPTION_KEYS"):
            SecretBox(keys).decrypt(encrypted)


def test_a_key_is_replaced_by_adding_one():
    old = SecretBox("old").encrypt("whsec_abc")
    both = SecretBox("new, old")

    assert both.decrypt(old) == "whsec_abc"
    assert SecretBox("new").decrypt(both.encrypt("whsec_def")) == "whsec_def"


def test_a_secret_stored_without_a_key_stays_readable_with_one():
    assert SecretBox("key").decrypt(SecretBox("").encrypt("whsec_abc")) == "whsec_abc"
