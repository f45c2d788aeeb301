"""`darkroom webhooks` as a person types it."""

import json

import pytest
from standardwebhooks import Webhook
from typer.testing import CliRunner

from darkroom.cli import app

pytestmark = pytest.mark.usefixtures("sender")


@pytest.fixture
def darkroom(webhook_api, monkeypatch):
    """Runs the command in this process; what it printed, and how it left."""
    monkeypatch.setenv("DARKROOM_API", str(webhook_api.base_url))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words, code=0):
        done = CliRunner().invoke(app, [*map(str, words)])
        assert done.exit_code == code, done.output
        return done.stdout

    return run


def test_from_adding_to_removing(darkroom, receiver):
    webhook = json.loads(darkroom("webhooks", "add", receiver.url(), "--event", "job.failed"))
    assert webhook["id"] in darkroom("webhooks", "list")

    receiver.reply = lambda _: (500, {"Retry-After": "4000"}, b"")
    failed = json.loads(darkroom("webhooks", "test", webhook["id"], code=1))
    assert [each["outcome"] for each in failed["attempts"]] == ["http_5xx"]
    assert "pending  webhook.test  -  http_5xx" in darkroom("webhooks", "deliveries", webhook["id"])

    receiver.reply = lambda _: (200, {}, b"")
    darkroom("webhooks", "replay", failed["id"])
    [first, again] = receiver.wait(2)
    assert first.id == again.id

    rotated = json.loads(darkroom("webhooks", "rotate", webhook["id"]))
    passed = json.loads(darkroom("webhooks", "test", webhook["id"]))
    assert passed["status"] == "accepted"
    tested = receiver.wait(3)[2]
    for secret in (webhook["secret"], rotated["secret"]):
        Webhook(secret).verify(tested.body, tested.headers)

    since = ("--since", "2026-01-01T00:00:00Z", "--webhook", webhook["id"])
    assert json.loads(darkroom("webhooks", "replay", *since))["replayed"] == 0
    darkroom("webhooks", "remove", webhook["id"])
    assert webhook["id"] not in darkroom("webhooks", "list")
    darkroom("webhooks", "test", webhook["id"], code=2)


def test_a_mistake_exits_with_two(darkroom):
    darkroom("webhooks", "add", "http://169.254.169.254/", code=2)
    darkroom("webhooks", "replay", code=2)
    darkroom("submit", "a cat", "--webhook-url", "ftp://127.0.0.1/", code=2)
    assert darkroom("webhooks", "secret").count("whsec_") == 1
    assert darkroom("webhooks", "generate-key").startswith("whsk_")
