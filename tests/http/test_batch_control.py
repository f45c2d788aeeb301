"""Batches paused, canceled, retried and listed."""

import threading
import uuid
from contextlib import contextmanager

import httpx2
import pytest
from sqlalchemy import func, select

from darkroom.db.tables import Event
from tests.support.api_server import assert_problem


@pytest.fixture
def polls(http):
    """Poll a batch until the block ends; collect each status and check that the counts sum."""

    @contextmanager
    def of(path):
        seen, wrong, stopped = [], [], threading.Event()

        def poll():
            with httpx2.Client(base_url=http.base_url, timeout=60) as client:
                while not stopped.is_set():
                    found = client.get(path).json()
                    counts = dict(found["counts"])
                    total = counts.pop("total")
                    counts.pop("rejected")
                    seen.append(found["status"])
                    wrong.extend([found] * (sum(counts.values()) != total))

        thread = threading.Thread(target=poll)
        thread.start()
        try:
            yield seen
        finally:
            stopped.set()
            thread.join()
        assert wrong == []

    return of


def test_counts_sum_at_every_poll_through_pauses_cancel_and_retry(http, submit, worker, polls):
    rows = "".join(f"{'poison' if n % 10 == 0 else 'a cat'},{n}\n" for n in range(1, 201))
    batch = submit("prompt,seed\n" + rows)
    path = batch["urls"]["self"]

    def verb(name):
        response = http.post(f"{path}/{name}")
        assert response.status_code in {200, 202}, response.text
        return response.json()

    with polls(path) as seen:
        for done in range(0, 80, 16):
            taken = worker.claim()
            paused = verb("pause")
            assert (paused["status"], paused["counts"]["running"]) == ("paused", 8)
            worker.settle(taken)
            assert worker.claim() == []
            assert http.get(path).json()["counts"]["queued"] == 200 - done - 8
            assert verb("resume")["status"] == "running"
            worker.run(1)
        taken = worker.claim()
        canceled = verb("cancel")
        assert (canceled["status"], canceled["counts"]["canceled"]) == ("canceled", 112)
        worker.settle(taken)
        ended = verb("cancel")
        failed = ended["counts"]["failed"]
        again = verb("retry")

    assert {"paused", "running"} <= set(seen)
    assert ended["counts"] == ended["counts"] | {"queued": 0, "running": 0, "canceled": 120}
    assert (failed, ended["counts"]["succeeded"]) == (8, 72)
    assert (again["counts"]["total"], again["retried_from"]) == (failed, batch["id"])
    assert verb("retry")["id"] == again["id"]
    with worker.sessions.begin() as session:
        ends = session.scalars(
            select(Event.type).where(Event.batch_id == batch["id"], Event.job_id.is_(None))
        ).all()
    assert ends == ["batch.canceled"]


def test_a_batch_completes_once_and_its_failed_jobs_are_retried(http, submit, worker):
    batch = submit("prompt\na cat\npoison\n")
    assert_problem(http.post(f"{batch['urls']['self']}/retry"), 409, "nothing_to_retry")
    worker.run()
    ended = http.get(batch["urls"]["self"]).json()
    again = http.post(batch["urls"]["retry"])

    assert (ended["status"], ended["outcome"]) == ("completed", "partial")
    assert again.status_code == 202
    [job] = http.get(again.json()["urls"]["jobs"]).json()["data"]
    assert (job["row_number"], job["input"]["prompt"]) == (2, "poison")
    with worker.sessions.begin() as session:
        events = select(func.count()).where(
            Event.batch_id == batch["id"], Event.type == "batch.completed"
        )
        assert session.scalar(events) == 1


def test_batches_are_listed_by_label_and_status(http, submit, worker):
    label = uuid.uuid4().hex
    done, canceled, paused = (submit(label=label) for _ in range(3))
    for batch, verb in ((canceled, "cancel"), (paused, "pause")):
        http.post(f"{batch['urls']['self']}/{verb}")
    worker.run()
    queued, running = (submit(label=label) for _ in range(2))
    http.post(f"{queued['urls']['self']}/pause")
    taken = worker.claim()
    http.post(f"{queued['urls']['self']}/resume")

    def listed(**params):
        found = http.get("/v1/batches", params={"label": label} | params).json()["data"]
        assert all(batch["status"] == params.get("status", batch["status"]) for batch in found)
        return [batch["id"] for batch in found]

    made = [done, canceled, paused, queued, running]
    assert listed() == [batch["id"] for batch in made[::-1]]
    for batch, status in zip(
        made, ["completed", "canceled", "paused", "queued", "running"], strict=True
    ):
        assert listed(status=status) == [batch["id"]]
    assert_problem(http.get("/v1/batches?status=generated"), 422)
    worker.settle(taken)
