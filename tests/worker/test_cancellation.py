"""Canceled and overdue jobs leave the microbatch in which they are being generated."""

import threading
import time

import pytest
from sqlalchemy import func, update

from darkroom.db.tables import Job
from darkroom.queue import dispatches
from tests.support.worker_context import cancel, job
from workers.generation.cancellation import cancellation_watcher
from workers.generation.microbatch import claim, run_microbatch


@pytest.fixture
def watcher(ctx):
    task = cancellation_watcher(ctx.sessions, ctx.heartbeat)
    task.start()
    yield task
    task.close()


@pytest.fixture
def running(slow_ctx, queue_jobs, watcher):  # noqa: ARG001  # it watches
    """Three running jobs, a thread that runs their microbatch, and how to wait for its end."""
    ctx = slow_ctx
    ids = queue_jobs(*[{}] * 3)
    thread = threading.Thread(target=lambda: run_microbatch(ctx, claim(ctx, None)))
    thread.start()
    ctx.generator.wait_started()

    def statuses_at_end():
        thread.join(30)
        assert not thread.is_alive()
        return [job(ctx, job_id).status for job_id in ids]

    yield ctx, ids, statuses_at_end
    ctx.generator.cancel()
    thread.join(30)


def wait_status(ctx, job_id, status):
    deadline = time.monotonic() + 20
    while job(ctx, job_id).status != status:
        assert time.monotonic() < deadline, job(ctx, job_id).status
        time.sleep(0.05)


def test_a_canceled_job_finishes_while_the_others_are_still_generated(running):
    ctx, ids, statuses_at_end = running
    cancel(ctx, ids[1])
    wait_status(ctx, ids[1], "canceled")
    assert [job(ctx, job_id).status for job_id in ids] == ["running", "canceled", "running"]

    ctx.generator.finish(0, 2)
    assert statuses_at_end() == ["succeeded", "canceled", "succeeded"]


def test_a_generated_job_succeeds_while_the_others_are_still_generated(running, s3_objects):
    ctx, ids, statuses_at_end = running
    ctx.generator.finish(2)
    wait_status(ctx, ids[2], "succeeded")
    assert [job(ctx, job_id).status for job_id in ids] == ["running", "running", "succeeded"]
    assert s3_objects() == [job(ctx, ids[2]).image_key]

    ctx.generator.finish(0, 1)
    assert statuses_at_end() == ["succeeded"] * 3


def test_a_lost_dispatch_is_stopped_when_a_job_is_settled_early(running):
    ctx, _, statuses_at_end = running
    with ctx.sessions.begin() as session:
        dispatches.release(session, ctx.worker_id)
    ctx.generator.finish(2)

    assert statuses_at_end() == ["queued"] * 3
    assert ctx.generator.canceled


def test_a_canceled_job_leaves_and_the_others_are_generated(running, s3_objects):
    ctx, ids, statuses_at_end = running
    cancel(ctx, ids[1])
    assert ctx.generator.wait_canceled(1)
    ctx.generator.finish(0, 2)

    assert statuses_at_end() == ["succeeded", "canceled", "succeeded"]
    assert len(s3_objects()) == 2
    assert not ctx.generator.canceled


def test_when_all_jobs_are_canceled_the_call_is(running):
    ctx, ids, statuses_at_end = running
    cancel(ctx, *ids)

    assert statuses_at_end() == ["canceled"] * 3
    assert ctx.generator.canceled


def test_when_all_unfinished_jobs_are_canceled_the_call_is(running):
    ctx, ids, statuses_at_end = running
    ctx.generator.finish(0)
    wait_status(ctx, ids[0], "succeeded")
    cancel(ctx, *ids[1:])

    assert statuses_at_end() == ["succeeded", "canceled", "canceled"]


def test_a_job_whose_deadline_passes_leaves_too(running):
    ctx, ids, statuses_at_end = running
    with ctx.sessions.begin() as session:
        session.execute(
            update(Job)
            .where(Job.id == ids[0])
            .values(expires_at=func.now(), deadline_at=func.now())
        )
    assert ctx.generator.wait_canceled(0)
    ctx.generator.finish(1, 2)

    assert statuses_at_end() == ["expired", "succeeded", "succeeded"]


def test_a_database_outage_only_delays_a_cancellation(running, postgres_server):
    ctx, ids, statuses_at_end = running
    postgres_server.kill()
    postgres_server.restart()
    cancel(ctx, ids[1])
    assert ctx.generator.wait_canceled(1)
    ctx.generator.finish(0, 2)

    assert statuses_at_end() == ["succeeded", "canceled", "succeeded"]
