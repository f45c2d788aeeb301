"""Signatures and keys, checked with the official verifier."""

import base64
import re
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from standardwebhooks import Webhook, WebhookVerificationError

from darkroom.errors import SetupError
from darkroom.webhooks import signatures


def test_the_official_verifier_accepts_our_signatures():
    secret = signatures.new_secret()
    now = int(time.time())
    headers = signatures.headers("evt_1", now, b'{"a":"\xc3\xa4"}', shared=[secret])

    assert Webhook(secret).verify(b'{"a":"\xc3\xa4"}', headers) == {"a": "ä"}
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(b'{"a":"b"}', headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(signatures.new_secret()).verify(b'{"a":"\xc3\xa4"}', headers)


def test_secrets_have_the_form_of_the_standard():
    secret = signatures.new_secret()

    assert re.fullmatch(r"whsec_[A-Za-z0-9+/]{43}=", secret)
    assert 24 <= len(base64.b64decode(secret.removeprefix("whsec_"))) <= 64


def test_during_a_rotation_either_secret_verifies():
    old, new = signatures.new_secret(), signatures.new_secret()
    now = int(time.time())
    headers = signatures.headers("evt_1", now, b"{}", shared=[new, old])

    for secret in (old, new):
        Webhook(secret).verify(b"{}", headers)


def test_each_key_pair_adds_a_v1a_signature():
    new, old = signatures.new_private_key(), signatures.new_private_key()
    private = signatures.private_keys(f"{new}, {old}")
    secret = signatures.new_secret()
    now = int(time.time())
    headers = signatures.headers("evt_1", now, b"{}", shared=[secret], private=private)

    Webhook(secret).verify(b"{}", headers)
    v1a = [
        each.removeprefix("v1a,")
        for each in headers["webhook-signature"].split(" ")
        if each.startswith("v1a,")
    ]
    content = f"evt_1.{now}.".encode() + b"{}"
    for key, signature in zip(private, v1a, strict=True):
        raw = base64.b64decode(signatures.public_key(key).removeprefix("whpk_"))
        Ed25519PublicKey.from_public_bytes(raw).verify(base64.b64decode(signature), content)


@pytest.mark.parametrize("text", ["whsk_", "whsk_!", "whsk_AAAA", "AAAA", "whsec_" + "A" * 44])
def test_an_invalid_key_is_rejected_at_the_start(text):
    with pytest.raises(SetupError, match="DARKROOM_WEBHOOK_SIGNING_KEY"):
        signatures.private_keys(text)
