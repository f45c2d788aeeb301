"""A worker that is told to stop: what is nearly drawn is finished, others go on with the rest."""

import threading
import time
from dataclasses import replace
from datetime import timedelta

import pytest
from redis import Redis
from sqlalchemy import select

from darkroom.db.tables import Dispatch
from tests.support.worker_context import ByHand, Patient, job, pictures_of
from workers.app import WorkerProcess, drain
from workers.generation.microbatch import claim, process_queue, run_microbatch


@pytest.fixture
def crew(patient_shop):
    return WorkerProcess(patient_shop, helpers=[], grace_s=0)


@pytest.fixture
def drawing(crew, queue_jobs):
    """Three jobs that a pump of the crew draws in a thread."""
    ids = queue_jobs(*[{}] * 3)
    thread = threading.Thread(target=lambda: run_microbatch(crew.ctx, claim(crew.ctx, None)))
    thread.start()
    crew.ctx.generator.wait_until_begun()
    yield ids, thread
    crew.ctx.generator.cancel()
    thread.join(30)


def successor(ctx):
    return replace(ctx, worker_id="successor", generator=ByHand(pictures_of))


def dispatches(ctx):
    with ctx.sessions.begin() as session:
        return session.scalars(select(Dispatch).order_by(Dispatch.id)).all()


def test_others_go_on_at_once_with_what_was_not_drawn(crew, drawing):
    ids, thread = drawing
    drain(crew)
    assert [job(crew.ctx, job_id).status for job_id in ids] == ["queued"] * 3
    process_queue(successor(crew.ctx), stopping=lambda: False)

    again = [job(crew.ctx, job_id) for job_id in ids]
    assert {(one.status, one.attempt, one.requeue_count) for one in again} == {("succeeded", 1, 0)}
    handed, taken = dispatches(crew.ctx)
    assert taken.created_at - handed.finished_at < timedelta(seconds=1)
    thread.join(30)
    assert not thread.is_alive()


def test_what_was_drawn_before_is_kept(crew, drawing):
    ids, _ = drawing
    crew.ctx.generator.draw(1)
    assert crew.ctx.generator.has_drawn(1)
    drain(crew)

    assert [job(crew.ctx, job_id).status for job_id in ids] == ["queued", "succeeded", "queued"]


def test_what_can_be_finished_in_time_is(crew, drawing):
    ids, thread = drawing
    crew.grace_s = 30
    leaving = threading.Thread(target=drain, args=[crew])
    leaving.start()
    crew.ctx.generator.draw(0, 1, 2)
    leaving.join(30)
    thread.join(30)

    assert {job(crew.ctx, job_id).status for job_id in ids} == {"succeeded"}
    assert not crew.ctx.generator.canceled


def test_what_is_claimed_while_it_stops_is_handed_over_too(crew, queue_jobs):
    [job_id] = queue_jobs({})
    claimed = claim(crew.ctx, None)
    drain(crew)
    run_microbatch(crew.ctx, claimed)

    assert job(crew.ctx, job_id).status == "queued"


class Deaf(Patient):
    """It hears no cancel."""

    def cancel(self):
        """Go on."""


def test_a_replica_that_does_not_let_go_keeps_nobody_waiting(crew, queue_jobs):
    ids = queue_jobs(*[{}] * 2)
    deaf = Deaf()
    ctx = replace(crew.ctx, generator=deaf)
    crew.ctx = ctx
    thread = threading.Thread(target=lambda: run_microbatch(ctx, claim(ctx, None)))
    thread.start()
    deaf.wait_until_begun()
    drain(crew)
    assert {job(ctx, job_id).status for job_id in ids} == {"queued"}
    process_queue(successor(ctx), stopping=lambda: False)
    deaf.draw(0, 1)
    thread.join(30)

    ended = [job(ctx, job_id) for job_id in ids]
    assert {(one.status, one.attempt) for one in ended} == {("succeeded", 1)}
    assert len(dispatches(ctx)) == 2


@pytest.mark.usefixtures("drawing")
def test_the_bell_is_rung_for_who_goes_on(crew, redis_url):
    with Redis.from_url(redis_url) as redis:
        redis.flushall()
        drain(crew)
        deadline = time.monotonic() + 20
        while not redis.llen("darkroom:generate"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
