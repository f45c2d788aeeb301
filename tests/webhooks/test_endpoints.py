"""Webhook endpoints over HTTP: creation, secrets, validation and scopes."""

import json

import httpx2
import psycopg
import pytest

from darkroom.accounts import api_keys
from darkroom.db.connection import open_sessions
from darkroom.db.tables import DEFAULT_TENANT
from darkroom.status import Scope
from tests.support.api_server import assert_problem, serve, stop


def test_an_endpoint_without_types_gets_all(register_webhook):
    assert register_webhook()["events"] == [
        "batch.canceled",
        "batch.completed",
        "job.canceled",
        "job.expired",
        "job.failed",
        "job.started",
        "job.succeeded",
        "webhook.disabled",
    ]


def test_the_secret_is_shown_once(webhook_api, register_webhook):
    webhook = register_webhook(events=["job.failed"])
    shown = webhook_api.get(f"/v1/webhooks/{webhook['id']}").json()

    assert webhook.pop("secret").startswith("whsec_")
    assert shown == webhook
    assert shown in webhook_api.get("/v1/webhooks", params={"limit": 100}).json()["data"]


def test_secrets_are_encrypted_in_the_database(webhook_api, api_database, register_webhook):
    secrets = [register_webhook()["secret"], webhook_api.get("/v1/webhook-secret").json()["secret"]]
    dumped = ""
    with psycopg.connect(api_database) as connection:
        for table in ("webhook_endpoint", "webhook_secret"):
            dumped += str(connection.execute(f"SELECT * FROM {table}").fetchall())

    assert "sealed:" in dumped
    for secret in secrets:
        assert secret.removeprefix("whsec_") not in dumped


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"url": ""},
        {"url": 7},
        {"url": "ftp://127.0.0.1/"},
        {"url": "http://169.254.169.254/latest/"},
        {"url": "http://user:pass@127.0.0.1/"},
        {"url": "http://127.0.0.1/", "events": []},
        {"url": "http://127.0.0.1/", "events": ["job.painted"]},
        {"url": "http://127.0.0.1/", "events": ["webhook.test"] * 20},
        {"url": "http://127.0.0.1/", "secret": "whsec_mine"},
        {"url": "http://127.0.0.1/" + "a" * 2048},
        {"url": "http://127.0.0.1/\0"},
        {"url": "http://127.0.0.1/\ud800"},
        [],
    ],
)
def test_invalid_input_creates_no_endpoint(webhook_api, body):
    before = webhook_api.get("/v1/webhooks", params={"limit": 100}).json()["data"]
    content = json.dumps(body)
    response = webhook_api.post(
        "/v1/webhooks", content=content, headers={"Content-Type": "application/json"}
    )

    assert_problem(response, 422)
    assert webhook_api.get("/v1/webhooks", params={"limit": 100}).json()["data"] == before


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"webhook_url": "http://169.254.169.254/"}, "webhook_url"),
        ({"webhook_url": "nonsense"}, "webhook_url"),
        ({"webhook_events": ["job.failed"]}, None),
        ({"webhook_url": "http://127.0.0.1/", "webhook_events": []}, "webhook_events"),
        (
            {"webhook_url": "http://127.0.0.1/", "webhook_events": ["batch.completed"]},
            "webhook_events",
        ),
    ],
)
def test_an_invalid_webhook_of_a_job_names_its_field(webhook_api, fields, place):
    found = assert_problem(webhook_api.post("/v1/jobs", json={"prompt": "a"} | fields), 422)

    assert place is None or place in str([error["loc"] for error in found["errors"]])


def test_by_default_only_public_https_is_registered(http):
    for url in ("http://127.0.0.1:9000/", "http://ok.example/", "https://localhost/"):
        found = assert_problem(http.post("/v1/webhooks", json={"url": url}), 422, "invalid_input")
        assert found["errors"][0]["code"] == "url_not_allowed"
        job = {"prompt": "a", "webhook_url": url}
        assert_problem(http.post("/v1/jobs", json=job), 422, "invalid_input")
    rows = http.post(
        "/v1/batches",
        content="prompt,webhook_url\na,https://ok.example/\nb,https://10.0.0.1/\n",
        headers={"Content-Type": "text/csv"},
    )
    assert assert_problem(rows, 422)["errors"][0]["loc"] == ["row", 2, "webhook_url"]
    with_url = {"webhook_url": "https://[::1]/"}
    csv = {"Content-Type": "text/csv"}
    assert_problem(
        http.post("/v1/batches", params=with_url, content="prompt\na\n", headers=csv), 422
    )


def test_an_unknown_id_is_404(webhook_api):
    nothing = f"/v1/webhooks/whk_{'0' * 32}"
    for method, path in [
        ("GET", nothing),
        ("DELETE", nothing),
        ("POST", f"{nothing}/test"),
        ("POST", f"{nothing}/rotate-secret"),
        ("POST", f"{nothing}/enable"),
        ("POST", f"{nothing}/replay?since=2026-01-01T00:00:00Z"),
        ("GET", f"{nothing}/deliveries"),
        ("GET", "/v1/webhooks/nonsense"),
        ("GET", f"/v1/deliveries/dlv_{'0' * 32}"),
        ("POST", f"/v1/deliveries/dlv_{'0' * 32}/replay"),
    ]:
        assert_problem(webhook_api.request(method, path), 404, "not_found")


def test_a_key_that_may_only_read_sees_no_signing_secret(
    webhook_environment, api_database, tmp_path
):
    sessions = open_sessions(api_database, pool_size=1)
    with sessions.begin() as session:
        made = {
            scope: api_keys.create(session, DEFAULT_TENANT, [scope]).secret
            for scope in (Scope.READ, Scope.SUBMIT)
        }
    sessions.kw["bind"].dispose()
    process, url = serve(webhook_environment | {"DARKROOM_AUTH": "on"}, tmp_path / "log")
    try:
        with httpx2.Client(base_url=url, timeout=60) as client:

            def ask(method, path, scope):
                bearer = {"Authorization": f"Bearer {made[scope]}"}
                return client.request(method, path, headers=bearer).status_code

            assert ask("GET", "/v1/webhook-secret", "submit") == 200
            for method, path in [
                ("GET", "/v1/webhook-secret"),
                ("POST", "/v1/webhook-secret/rotate"),
                ("POST", "/v1/webhooks"),
                ("POST", f"/v1/webhooks/whk_{'0' * 32}/rotate-secret"),
                ("DELETE", f"/v1/webhooks/whk_{'0' * 32}"),
                ("POST", f"/v1/deliveries/dlv_{'0' * 32}/replay"),
            ]:
                assert ask(method, path, "read") == 403, path
            assert ask("GET", "/v1/webhooks", "read") == 200
    finally:
        stop(process)
