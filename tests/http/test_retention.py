"""The cleaner, as clients see it: tombstones, and objects that are removed."""

from datetime import timedelta

import httpx2
import pytest
from sqlalchemy import func, select, update

from darkroom.db.tables import Batch, Job, RejectedRowChunk, Tenant
from tests.support.api_server import assert_problem
from tests.support.batch_results import archive_of, manifest_of
from workers.maintenance.cleaner import Cleaner


@pytest.fixture
def clean(worker):
    def run(**options):
        options = {"retention_days": None, "orphan_age": timedelta(hours=24)} | options
        cleaner = Cleaner(worker.sessions, worker.store, **options)
        pages = 1 + 1000 // 500
        for _ in range(pages):
            cleaner.clean()

    return run


def aged(worker, days, **subject):
    """Move the end of finished jobs and batches back by so many days."""
    back = {"finished_at": func.now() - timedelta(days=days)}
    with worker.sessions.begin() as session:
        session.execute(update(Batch).where(Batch.id == subject.get("batch")).values(back))
        session.execute(
            update(Job)
            .where((Job.batch_id == subject.get("batch")) | (Job.id == subject.get("job")))
            .values(back)
        )


def test_jobs_past_their_retention_become_tombstones(http, submit, worker, clean):
    batch = submit("prompt\na cat\n\0\n", on_error="skip", retention_days=3, label="secret")
    other = submit("prompt\na dog\n")
    worker.run()
    [line], [kept] = manifest_of(http, batch), manifest_of(http, other)
    aged(worker, 2.9, batch=batch["id"])
    aged(worker, 1000, batch=other["id"])
    clean()
    assert http.get(f"/v1/jobs/{line['id']}").status_code == 200
    aged(worker, 3.1, batch=batch["id"])
    clean()

    assert_problem(http.get(f"/v1/jobs/{line['id']}"), 410)
    assert httpx2.get(line["url"]).status_code == 404
    found = http.get(batch["urls"]["self"]).json()
    assert found["deleted_at"]
    assert (found["label"], found["counts"]["succeeded"]) == (None, 1)
    assert "a cat" not in http.get(batch["urls"]["manifest"]).text
    assert archive_of(http, batch).namelist() == []
    with worker.sessions.begin() as session:
        assert not session.scalars(
            select(RejectedRowChunk.piece).where(RejectedRowChunk.batch_id == batch["id"])
        ).all()
    assert httpx2.get(kept["url"]).status_code == 200


def test_a_batch_without_retention_has_that_of_its_tenant(http, submit, worker, clean):
    long, short = submit("prompt\na\n", retention_days=9), submit("prompt\na\n")
    single = http.post("/v1/jobs", json={"prompt": "alone"}).json()
    worker.run()
    for days, default_days, gone in ((5, None, False), (5, 6, False), (5, 4, True)):
        for batch in (long, short):
            aged(worker, days, batch=batch["id"])
        aged(worker, days, job=single["id"])
        clean(retention_days=default_days)
        assert bool(http.get(short["urls"]["self"]).json()["deleted_at"]) is gone
        assert (http.get(f"/v1/jobs/{single['id']}").status_code == 410) is gone
        assert not http.get(long["urls"]["self"]).json()["deleted_at"]

    later = submit("prompt\na\n")
    worker.run()
    aged(worker, 5, batch=later["id"])
    set_days(worker, 2)
    try:
        clean(retention_days=100)
    finally:
        set_days(worker, None)
    assert http.get(later["urls"]["self"]).json()["deleted_at"]


def set_days(worker, days):
    with worker.sessions.begin() as session:
        session.execute(update(Tenant).values(retention_days=days))


def test_only_old_objects_without_a_job_are_removed(http, submit, worker, clean):
    batch = submit("prompt\na\nb\n")
    worker.run()
    known = [line["key"] for line in manifest_of(http, batch)]
    running = submit("prompt\nc\n")
    [taken] = worker.claim()
    under_way = f"{taken.tenant_id}/{taken.id}/{taken.dispatch_id}.png"
    lost = known[0].replace(".png", ".jpg").rpartition("/")[0] + "/1.png"
    strangers = f"ten_default/job_{'0' * 32}/7.png"
    foreign = "backup/of/mine.png"
    for key in (under_way, lost, strangers, foreign):
        worker.store.put(key, b"x", "image/png")

    clean()
    assert stored(worker, under_way, lost, strangers, foreign, *known) == [True] * 6
    clean(orphan_age=timedelta(0))
    assert stored(worker, lost, strangers) == [False] * 2
    assert stored(worker, under_way, foreign, *known) == [True] * 4
    worker.settle([taken])
    assert manifest_of(http, running)[0]["status"] == "succeeded"
    worker.store.delete(foreign)


def stored(worker, *keys):
    there, after = set(), ""
    while page := worker.store.page(after=after, limit=500):
        there |= {each.key for each in page}
        after = page[-1].key
    return [key in there for key in keys]
