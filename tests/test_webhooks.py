"""Webhooks from the API to a receiver: real processes, a real receiver, the official verifier."""

import pytest

pytest_plugins = ["webhook_servers"]
pytestmark = pytest.mark.usefixtures("sender")


@pytest.fixture
def endpoint(webhook_api, receiver):
    """Registers an endpoint at the receiver."""

    def register(path="/hook", **wanted):
        asked = {"url": receiver.url(path)} | wanted
        response = webhook_api.post("/v1/webhooks", json=asked)
        assert response.status_code == 201, response.text
        return response.json()

    return register


@pytest.fixture
def canceled_job(webhook_api):
    """Submits a job and cancels it: an event without anybody who draws."""

    def submit(**fields):
        asked = {"prompt": "a red apple"} | fields
        job = webhook_api.post("/v1/jobs", json=asked).raise_for_status().json()
        return webhook_api.post(f"/v1/jobs/{job['id']}/cancel").raise_for_status().json()

    return submit


def test_an_event_reaches_its_endpoint_signed(receiver, endpoint, canceled_job):
    webhook = endpoint(events=["job.canceled"])
    job = canceled_job(label="mine")
    [received] = receiver.wait()

    body = received.verify(webhook["secret"])
    assert body["type"] == "job.canceled"
    assert body["data"]["id"] == job["id"]
    assert body["data"]["status"] == "canceled"
    assert body["data"]["label"] == "mine"
    assert received.id.startswith("evt_")
