"""API keys and their scopes, and what protects an API without them."""

import time

import httpx2

from darkroom.accounts import api_keys
from darkroom.db.tables import DEFAULT_TENANT
from darkroom.status import Scope
from tests.support.api_server import ApiProcess, assert_problem, until


def test_without_auth_an_untrusted_host_is_refused(http, rows):
    before = rows()
    for method in ("GET", "POST"):
        request = http.build_request(method, "/v1/jobs", json={"prompt": "a"})
        request.headers["host"] = "evil.example:8000"
        assert_problem(http.send(request), 403, "untrusted_host")
    assert rows() == before


def test_a_key_grants_its_scopes_until_it_is_revoked(keyed_api, sessions):
    with sessions.begin() as session:
        reader = api_keys.create(session, DEFAULT_TENANT, [Scope.READ])
        writer = api_keys.create(session, DEFAULT_TENANT, [Scope.SUBMIT, Scope.READ])

    def ask(secret, method="GET", **request):
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        return httpx2.request(method, f"{keyed_api.url}/v1/jobs", headers=headers, **request)

    assert_problem(ask(None), 401, "missing_api_key")
    assert ask(None).headers["www-authenticate"] == "Bearer"
    assert_problem(ask("dk_" + "a" * 38), 401, "invalid_api_key")
    assert ask(reader.secret).status_code == 200
    assert_problem(ask(reader.secret, "POST", json={"prompt": "a"}), 403, "missing_scope")
    assert ask(writer.secret, "POST", json={"prompt": "a"}).status_code == 202
    with sessions.begin() as session:
        api_keys.revoke(session, writer.id)
    revoked = time.monotonic()
    until(lambda: ask(writer.secret).status_code == 401, seconds=10)
    assert time.monotonic() - revoked < 5  # one, on a quiet machine
    assert_problem(ask(writer.secret), 401, "invalid_api_key")
    assert writer.secret not in keyed_api.log.read_text()


def test_without_auth_it_refuses_to_listen_beyond_loopback(api_environment, tmp_path):
    log = tmp_path / "log"
    refused = ApiProcess(api_environment | {"DARKROOM_API_HOST": "0.0.0.0"}, log)

    assert refused.wait(60) == 2
    assert "DARKROOM_AUTH" in log.read_text()
