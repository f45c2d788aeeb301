"""Fixtures that make events, claim and settle deliveries, and let time pass."""

import json
from datetime import timedelta

import pytest
from sqlalchemy import select, update

from darkroom import batches
from darkroom.db.tables import DEFAULT_TENANT
from darkroom.db.webhook_tables import Delivery, DeliveryAttempt
from darkroom.event_types import SUBSCRIBABLE
from darkroom.jobs import lifecycle
from darkroom.webhooks import deliveries, endpoints, payloads
from darkroom.webhooks.deliveries import Result
from darkroom.webhooks.payload_models import MESSAGES
from darkroom.webhooks.secret_box import SecretBox
from tests.conftest import new_job

LEASE = timedelta(seconds=60)
SECRET_BOX = SecretBox("a key")


@pytest.fixture
def endpoint(sessions):
    """Creates an endpoint; returns its id."""

    def make(*kinds, tenant=DEFAULT_TENANT, url="https://ok.example/hook"):
        with sessions.begin() as session:
            made = endpoints.create(
                session,
                tenant,
                url=url,
                event_types=set(kinds or SUBSCRIBABLE),
                secret_box=SECRET_BOX,
                max_endpoints=100,
            )
        return made.endpoint.id

    return make


@pytest.fixture
def queue_batch(sessions, registry):
    """Queues a batch; returns its id and those of its jobs."""

    def queue(count, *, total=None, webhook_url=None, **fields):
        rows = [
            new_job(registry, {"seed": number} | fields, row_number=number)
            for number in range(1, count + 1)
        ]
        with sessions.begin() as session:
            batch = batches.create(
                session, DEFAULT_TENANT, total=total or count, label="b", webhook_url=webhook_url
            )
            return batch.id, lifecycle.submit(session, DEFAULT_TENANT, rows, batch_id=batch.id)

    return queue


@pytest.fixture
def cancel(sessions):
    """Cancels jobs: the shortest way to an event."""

    def end(*job_ids):
        with sessions.begin() as session:
            for job_id in job_ids:
                lifecycle.cancel(session, DEFAULT_TENANT, job_id)

    return end


@pytest.fixture
def rows(sessions):
    """Returns all deliveries, oldest first."""

    def read():
        with sessions.begin() as session:
            return session.scalars(select(Delivery).order_by(Delivery.id)).all()

    return read


@pytest.fixture
def claim_due(sessions):
    """Claims due deliveries."""

    def claim(limit=100, *, admit=lambda _: None, lease=LEASE):
        with sessions.begin() as session:
            return deliveries.claim(session, limit=limit, lease=lease, admit=admit)[0]

    return claim


@pytest.fixture
def settle(sessions):
    """Settles claims with one outcome; returns how many claims still held."""

    def end(claimed, outcome, retry_after_s=None):
        with sessions.begin() as session:
            results = [Result(claim, outcome, retry_after_s) for claim in claimed]
            return deliveries.settle(session, results)

    return end


@pytest.fixture
def advance(sessions):
    """Lets time pass: deliveries due in so many seconds are due now."""

    def skip(seconds=10**7):
        with sessions.begin() as session:
            session.execute(
                update(Delivery).values(
                    next_attempt_at=Delivery.next_attempt_at - timedelta(seconds=seconds)
                )
            )

    return skip


@pytest.fixture
def body_of(sessions):
    """Renders the body of a claim, and checks it against its schema of the OpenAPI document."""

    def render(claim):
        with sessions.begin() as session:
            body = json.loads(payloads.bodies(session, [claim])[claim.id])
        MESSAGES[claim.type].model_validate(body)
        return body

    return render


@pytest.fixture
def attempts_of(sessions):
    """Returns the outcomes of a delivery's attempts, in order."""

    def read(delivery_id):
        query = select(DeliveryAttempt.outcome).where(DeliveryAttempt.delivery_id == delivery_id)
        with sessions.begin() as session:
            return session.scalars(query.order_by(DeliveryAttempt.number)).all()

    return read


@pytest.fixture
def register_webhook(webhook_api, receiver):
    """Registers endpoints at the receiver over HTTP; deletes them after the test."""
    made = []

    def register(path="/hook", **wanted):
        asked = {"url": receiver.url(path)} | wanted
        response = webhook_api.post("/v1/webhooks", json=asked)
        assert response.status_code == 201, response.text
        made.append(response.json()["id"])
        return response.json()

    yield register
    for webhook_id in made:
        webhook_api.delete(f"/v1/webhooks/{webhook_id}")


@pytest.fixture
def canceled_job(webhook_api):
    """Submits a job and cancels it: an event that needs no worker."""

    def submit(**fields):
        asked = {"prompt": "a red apple"} | fields
        job = webhook_api.post("/v1/jobs", json=asked).raise_for_status().json()
        return webhook_api.post(f"/v1/jobs/{job['id']}/cancel").raise_for_status().json()

    return submit
