"""A worker that stops finishes what it can in its grace period; the other jobs are requeued."""

import threading
import time
from dataclasses import replace
from datetime import timedelta

import pytest
from redis import Redis
from sqlalchemy import select

from darkroom.db.tables import Dispatch
from tests.support.worker_context import FakeGenerator, SlowGenerator, images_of, job
from workers.app import WorkerProcess, drain
from workers.generation.microbatch import claim, process_queue, run_microbatch


@pytest.fixture
def process(slow_ctx):
    return WorkerProcess(slow_ctx, background=[], grace_s=0)


@pytest.fixture
def running(process, queue_jobs):
    """Three running jobs, and the thread that runs their microbatch."""
    ids = queue_jobs(*[{}] * 3)
    thread = threading.Thread(target=lambda: run_microbatch(process.ctx, claim(process.ctx, None)))
    thread.start()
    process.ctx.generator.wait_started()
    yield ids, thread
    process.ctx.generator.cancel()
    thread.join(30)


def successor(ctx):
    return replace(ctx, worker_id="successor", generator=FakeGenerator(images_of))


def dispatches(ctx):
    with ctx.sessions.begin() as session:
        return session.scalars(select(Dispatch).order_by(Dispatch.id)).all()


def test_another_worker_claims_the_unfinished_jobs_at_once(process, running):
    ids, thread = running
    drain(process)
    assert [job(process.ctx, job_id).status for job_id in ids] == ["queued"] * 3
    process_queue(successor(process.ctx), stopping=lambda: False)

    again = [job(process.ctx, job_id) for job_id in ids]
    assert {(one.status, one.attempt, one.requeue_count) for one in again} == {("succeeded", 1, 0)}
    released, taken = dispatches(process.ctx)
    assert taken.created_at - released.finished_at < timedelta(seconds=1)
    thread.join(30)
    assert not thread.is_alive()


def test_jobs_finished_before_the_stop_succeed(process, running):
    ids, _ = running
    process.ctx.generator.finish(1)
    assert process.ctx.generator.wait_finished(1)
    drain(process)

    assert [job(process.ctx, job_id).status for job_id in ids] == ["queued", "succeeded", "queued"]


def test_jobs_that_finish_within_the_grace_period_succeed(process, running):
    ids, thread = running
    process.grace_s = 30
    leaving = threading.Thread(target=drain, args=[process])
    leaving.start()
    process.ctx.generator.finish(0, 1, 2)
    leaving.join(30)
    thread.join(30)

    assert {job(process.ctx, job_id).status for job_id in ids} == {"succeeded"}
    assert not process.ctx.generator.canceled


def test_jobs_claimed_while_the_worker_stops_are_requeued(process, queue_jobs):
    [job_id] = queue_jobs({})
    claimed = claim(process.ctx, None)
    drain(process)
    run_microbatch(process.ctx, claimed)

    assert job(process.ctx, job_id).status == "queued"


class UncancelableGenerator(SlowGenerator):
    def cancel(self):
        pass


def test_a_replica_that_ignores_the_cancel_does_not_delay_the_requeue(process, queue_jobs):
    ids = queue_jobs(*[{}] * 2)
    uncancelable = UncancelableGenerator()
    ctx = replace(process.ctx, generator=uncancelable)
    process.ctx = ctx
    thread = threading.Thread(target=lambda: run_microbatch(ctx, claim(ctx, None)))
    thread.start()
    uncancelable.wait_started()
    drain(process)
    assert {job(ctx, job_id).status for job_id in ids} == {"queued"}
    process_queue(successor(ctx), stopping=lambda: False)
    uncancelable.finish(0, 1)
    thread.join(30)

    jobs = [job(ctx, job_id) for job_id in ids]
    assert {(one.status, one.attempt) for one in jobs} == {("succeeded", 1)}
    assert len(dispatches(ctx)) == 2


@pytest.mark.usefixtures("running")
def test_other_workers_are_woken(process, redis_url):
    with Redis.from_url(redis_url) as redis:
        redis.flushall()
        drain(process)
        deadline = time.monotonic() + 20
        while not redis.llen("darkroom:generate"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
