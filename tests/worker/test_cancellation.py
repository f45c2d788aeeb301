"""Jobs that nobody wants any more leave the microbatch that they are being drawn in."""

import threading
import time

import pytest
from sqlalchemy import func, update

from darkroom.db.tables import Job
from darkroom.queue import dispatches
from tests.support.worker_context import cancel, job
from workers.generation.cancellation import CancellationWatcher
from workers.generation.microbatch import claim, run_microbatch


@pytest.fixture
def withdrawals(ctx):
    listening = CancellationWatcher(ctx.sessions, ctx.leases)
    listening.start()
    yield listening
    listening.close()


@pytest.fixture
def drawing(patient_shop, queue_jobs, withdrawals):  # noqa: ARG001  # it listens
    """Three jobs under way, a pump that draws them in a thread, and how to wait for its end."""
    ids = queue_jobs(*[{}] * 3)
    pump = threading.Thread(target=lambda: run_microbatch(ctx, claim(ctx, None)))
    ctx = patient_shop
    pump.start()
    ctx.generator.wait_until_begun()

    def ended():
        pump.join(30)
        assert not pump.is_alive()
        return [job(ctx, job_id).status for job_id in ids]

    yield ctx, ids, ended
    ctx.generator.cancel()
    pump.join(30)


def becomes(ctx, job_id, status):
    deadline = time.monotonic() + 20
    while job(ctx, job_id).status != status:
        assert time.monotonic() < deadline, job(ctx, job_id).status
        time.sleep(0.05)


def test_a_canceled_job_ends_while_its_company_is_still_drawn(drawing):
    ctx, ids, ended = drawing
    cancel(ctx, ids[1])
    becomes(ctx, ids[1], "canceled")
    assert [job(ctx, job_id).status for job_id in ids] == ["running", "canceled", "running"]

    ctx.generator.draw(0, 2)
    assert ended() == ["succeeded", "canceled", "succeeded"]


def test_a_job_that_is_drawn_succeeds_while_its_company_is_still_drawn(drawing, s3_objects):
    ctx, ids, ended = drawing
    ctx.generator.draw(2)
    becomes(ctx, ids[2], "succeeded")
    assert [job(ctx, job_id).status for job_id in ids] == ["running", "running", "succeeded"]
    assert s3_objects() == [job(ctx, ids[2]).image_key]

    ctx.generator.draw(0, 1)
    assert ended() == ["succeeded"] * 3


def test_a_dispatch_that_others_took_is_given_up_when_something_was_to_be_settled(drawing):
    ctx, _, ended = drawing
    with ctx.sessions.begin() as session:
        dispatches.release(session, ctx.worker_id)
    ctx.generator.draw(2)

    assert ended() == ["queued"] * 3
    assert ctx.generator.canceled


def test_a_canceled_job_leaves_and_its_company_is_drawn(drawing, s3_objects):
    ctx, ids, ended = drawing
    cancel(ctx, ids[1])
    assert ctx.generator.left_out(1)
    ctx.generator.draw(0, 2)

    assert ended() == ["succeeded", "canceled", "succeeded"]
    assert len(s3_objects()) == 2
    assert not ctx.generator.canceled


def test_when_all_are_canceled_the_call_is(drawing):
    ctx, ids, ended = drawing
    cancel(ctx, *ids)

    assert ended() == ["canceled"] * 3
    assert ctx.generator.canceled


def test_when_all_that_is_left_is_canceled_the_call_is(drawing):
    ctx, ids, ended = drawing
    ctx.generator.draw(0)
    becomes(ctx, ids[0], "succeeded")
    cancel(ctx, *ids[1:])

    assert ended() == ["succeeded", "canceled", "canceled"]


def test_a_job_whose_deadline_passes_leaves_too(drawing):
    ctx, ids, ended = drawing
    with ctx.sessions.begin() as session:
        session.execute(
            update(Job)
            .where(Job.id == ids[0])
            .values(expires_at=func.now(), deadline_at=func.now())
        )
    assert ctx.generator.left_out(0)
    ctx.generator.draw(1, 2)

    assert ended() == ["expired", "succeeded", "succeeded"]


def test_a_database_that_is_away_for_a_while_delays_it_only(drawing, postgres_server):
    ctx, ids, ended = drawing
    postgres_server.kill()
    postgres_server.restart()
    cancel(ctx, ids[1])
    assert ctx.generator.left_out(1)
    ctx.generator.draw(0, 2)

    assert ended() == ["succeeded", "canceled", "succeeded"]
