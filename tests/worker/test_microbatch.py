"""Microbatches from claim to settle, on real rows and a real store, with a fake generator."""

import time
from datetime import timedelta

import numpy as np
import pytest
from redis import Redis
from sqlalchemy import func, select, update

from darkroom.db.tables import Dispatch, Job
from darkroom.errors import (
    GeneratorGone,
    GeneratorUnavailable,
    MicrobatchCrashed,
    StorageUnavailable,
)
from darkroom.jobs import progress
from tests.support.worker_context import cancel, images_of, job
from workers.app import WorkerProcess, run_process_queue
from workers.generation.generator import Canceled, Finished, Image, OutOfMemory, Progress, RowFailed
from workers.generation.microbatch import claim, process_queue, run_microbatch


def run(ctx, answer=images_of):
    ctx.generator.answer = answer
    return process_queue(ctx, stopping=lambda: False)


def open_dispatches(ctx):
    with ctx.sessions.begin() as session:
        running = select(func.count()).select_from(Dispatch).where(Dispatch.status == "running")
        return session.scalar(running)


def test_microbatches_are_run_until_no_job_is_left(ctx, queue_jobs):
    ids = queue_jobs(*[{"width": 64, "height": 64}] * 19)

    assert run(ctx) == 3
    assert {job(ctx, job_id).status for job_id in ids} == {"succeeded"}
    assert open_dispatches(ctx) == 0


def test_an_image_of_the_wrong_size_fails_its_job(ctx, queue_jobs):
    right, wrong = queue_jobs({}, {})

    def answer(microbatch):
        return [images_of(microbatch)[0], Image(np.zeros((8, 8, 3), np.uint8), 1)]

    run(ctx, answer)
    assert job(ctx, right).status == "succeeded"
    assert (job(ctx, wrong).status, job(ctx, wrong).error_code) == ("failed", "invalid_output")


def test_a_failed_row_fails_only_its_own_job(ctx, queue_jobs):
    good, bad = queue_jobs({}, {})
    run(ctx, lambda asked: [images_of(asked)[0], RowFailed("not_finite", "not a number")])

    assert job(ctx, good).status == "succeeded"
    assert (job(ctx, bad).status, job(ctx, bad).error_code) == ("failed", "not_finite")


@pytest.mark.parametrize("answer", [lambda _: [], lambda _: MicrobatchCrashed("died")])
def test_after_three_crashes_or_missing_results_a_job_fails(ctx, queue_jobs, answer):
    [job_id] = queue_jobs({})
    ctx.generator.answer = answer
    for _ in range(3):
        process_queue(ctx, stopping=lambda: False)

    finished = job(ctx, job_id)
    assert (finished.status, finished.error_code, finished.attempt) == (
        "failed",
        "worker_crashed",
        3,
    )
    assert open_dispatches(ctx) == 0


@pytest.mark.parametrize("index", [0, 7])
def test_an_impossible_result_makes_suspects_of_unfinished_jobs(ctx, queue_jobs, index):
    ids = queue_jobs(*[{}] * 2)

    def answer(asked):
        image = images_of(asked)[0]
        return [Finished(0, image), Finished(index, image), Finished(1, image)]

    ctx.generator.answer = answer
    run_microbatch(ctx, claim(ctx, None))
    assert [job(ctx, job_id).status for job_id in ids] == ["succeeded", "queued"]


def test_a_job_finished_before_the_crash_is_no_suspect(ctx, queue_jobs):
    ids = queue_jobs(*[{}] * 3)
    ctx.generator.answer = lambda asked: [images_of(asked)[0], MicrobatchCrashed("died")]
    run_microbatch(ctx, claim(ctx, None))

    finished, *suspects = (job(ctx, job_id) for job_id in ids)
    assert (finished.status, finished.isolation_group) == ("succeeded", "")
    assert [suspect.status for suspect in suspects] == ["queued"] * 2
    assert all(suspect.isolation_group for suspect in suspects)


def test_suspects_are_generated_alone(ctx, queue_jobs):
    queue_jobs(*[{}] * 3)
    run(ctx, lambda asked: MicrobatchCrashed("died") if len(asked) == 3 else images_of(asked))
    assert list(zip(ctx.generator.calls, ctx.generator.alone, strict=True)) == [
        (3, False),
        (2, True),
        (1, True),
    ]


@pytest.mark.parametrize("index", [0, 7, 11])
def test_of_two_microbatches_that_crash_together_only_the_poison_fails(ctx, queue_jobs, index):
    prompts = [{"prompt": "poison" if at == index else "a cat"} for at in range(16)]
    ids = queue_jobs(*prompts)
    ctx.generator.answer = lambda _: MicrobatchCrashed("died")
    together = [claim(ctx, None), claim(ctx, None)]
    for microbatch in together:
        run_microbatch(ctx, microbatch)
    assert ctx.generator.calls == [8, 8]

    def answer(asked):
        deadly = any(params.prompt == "poison" for params in asked)
        return MicrobatchCrashed("died") if deadly else images_of(asked)

    run(ctx, answer)
    assert ctx.generator.alone == [False] * 2 + [True] * (len(ctx.generator.calls) - 2)
    jobs = [job(ctx, job_id) for job_id in ids]
    poison = jobs.pop(index)
    assert (poison.status, poison.error_code, poison.attempt) == ("failed", "worker_crashed", 3)
    assert {one.status for one in jobs} == {"succeeded"}
    assert sorted({one.attempt for one in jobs}) == [2, 3]  # a half of four crashed twice
    assert open_dispatches(ctx) == 0


def test_jobs_finished_before_the_replica_became_unavailable_succeed(ctx, queue_jobs):
    ids = queue_jobs(*[{}] * 2)
    with pytest.raises(GeneratorUnavailable):
        run(ctx, lambda asked: [images_of(asked)[0], GeneratorUnavailable("no replica")])

    assert [job(ctx, job_id).status for job_id in ids] == ["succeeded", "queued"]


def memory_for(most):
    """Return an answer with memory for so many rows together."""

    def answer(asked):
        return [OutOfMemory()] * len(asked) if len(asked) > most else images_of(asked)

    return answer


def test_a_microbatch_without_enough_memory_is_halved_until_it_fits(ctx, queue_jobs):
    ids = queue_jobs(*[{}] * 7)
    run(ctx, memory_for(2))

    assert ctx.generator.calls == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert {job(ctx, job_id).status for job_id in ids} == {"succeeded"}
    assert {job(ctx, job_id).attempt for job_id in ids} == {1}
    assert {job(ctx, job_id).requeue_count for job_id in ids} == {0}


def test_a_memory_limit_is_remembered_for_its_microbatch_key_alone(ctx, queue_jobs):
    queue_jobs(*[{}] * 4)
    run(ctx, memory_for(2))
    queue_jobs(*[{}] * 4)
    run(ctx)
    queue_jobs(*[{"width": 64}] * 4)
    run(ctx)

    assert ctx.generator.calls == [4, 2, 2, 2, 2, 4]


def test_rows_that_fitted_are_not_generated_again(ctx, queue_jobs):
    ids = queue_jobs(*[{}] * 3)

    def answer(asked):
        if len(asked) == 3:
            return [images_of(asked)[0], OutOfMemory(), OutOfMemory()]
        return images_of(asked)

    run(ctx, answer)
    assert ctx.generator.calls == [3, 1, 1]
    assert {job(ctx, job_id).status for job_id in ids} == {"succeeded"}


def test_an_image_that_does_not_fit_alone_fails(ctx, queue_jobs):
    [job_id] = queue_jobs({})
    run(ctx, memory_for(0))

    finished = job(ctx, job_id)
    assert (finished.status, finished.error_code) == ("failed", "out_of_memory")


def test_a_row_canceled_without_a_request_is_requeued(ctx, queue_jobs):
    ids = queue_jobs({}, {})
    run(ctx, lambda asked: [images_of(asked)[0], Canceled()])

    assert [job(ctx, job_id).status for job_id in ids] == ["succeeded", "queued"]
    assert job(ctx, ids[1]).requeue_count == 1


def test_a_job_that_is_canceled_as_it_is_stored_leaves_no_image(ctx, queue_jobs, s3_objects):
    kept, canceled = queue_jobs({}, {})

    def answer(asked):
        cancel(ctx, canceled)
        return images_of(asked)

    run(ctx, answer)
    assert job(ctx, canceled).status == "canceled"
    assert s3_objects() == [job(ctx, kept).image_key]


def test_an_image_that_comes_after_the_lease_is_removed_from_the_store(ctx, queue_jobs, s3_objects):
    [job_id] = queue_jobs({})

    def answer(asked):
        with ctx.sessions.begin() as session:
            session.execute(update(Dispatch).values(status="expired", finished_at=func.now()))
        return images_of(asked)

    run(ctx, answer)
    assert job(ctx, job_id).status == "running"  # until the reaper requeues it
    assert s3_objects() == []


def test_steps_are_published_during_generation(ctx, queue_jobs, redis_url):
    [job_id] = queue_jobs({"num_inference_steps": 9})
    seen = []

    def answer(asked):
        yield Progress({0: (4, 9)})
        deadline = time.monotonic() + 20
        with Redis.from_url(redis_url) as redis:
            while not seen and time.monotonic() < deadline:
                seen.extend(progress.read(redis, [job(ctx, job_id)]).values())
        yield from images_of(asked)

    run(ctx, answer)
    assert seen == [(4, 9)]
    assert job(ctx, job_id).status == "succeeded"


def test_a_frozen_redis_does_not_delay_generation(ctx, queue_jobs, redis_server):
    [job_id] = queue_jobs({})
    redis_server.freeze()
    steps = [Progress({0: (step, 50)}) for step in range(50)]
    run(ctx, lambda asked: [*steps, Finished(0, images_of(asked)[0])])

    assert job(ctx, job_id).status == "succeeded"


def test_without_a_replica_jobs_are_requeued_and_lose_no_attempt(ctx, queue_jobs):
    [job_id] = queue_jobs({})
    with pytest.raises(GeneratorUnavailable):
        run(ctx, lambda _: GeneratorUnavailable("no replica"))

    waiting = job(ctx, job_id)
    assert (waiting.status, waiting.attempt, waiting.requeue_count) == ("queued", 0, 1)
    assert open_dispatches(ctx) == 0


def test_a_store_that_fails_during_generation_requeues_the_job(ctx, queue_jobs, s3_server):
    [job_id] = queue_jobs({})

    def answer(microbatch):
        s3_server.kill()
        return images_of(microbatch)

    run(ctx, answer)
    waiting = job(ctx, job_id)
    assert (waiting.status, waiting.attempt, waiting.requeue_count) == ("queued", 0, 1)


def test_without_a_store_nothing_is_claimed(ctx, queue_jobs, s3_server):
    [job_id] = queue_jobs({})
    s3_server.kill()
    with pytest.raises(StorageUnavailable):
        run(ctx)
    assert (job(ctx, job_id).status, job(ctx, job_id).requeue_count) == ("queued", 0)


def test_a_worker_exits_when_the_cluster_is_gone_twice(ctx, queue_jobs):
    queue_jobs({})
    left = []
    process = WorkerProcess(ctx, background=[], grace_s=5, leave=lambda: left.append(True))
    ctx.generator.answer = lambda _: GeneratorGone("no cluster")
    for expected in ([], [True]):
        with ctx.sessions.begin() as session:
            session.execute(update(Job).values(scheduled_at=func.now() - timedelta(seconds=1)))
        run_process_queue(process)
        assert left == expected
