"""The heart of a worker, with real rows and a real store; only what draws is given by hand."""

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
from tests.support.worker_context import cancel, job, pictures_of
from workers.app import WorkerProcess, run_process_queue
from workers.generation.generator import Canceled, Finished, Image, OutOfMemory, Progress, RowFailed
from workers.generation.microbatch import claim, process_queue, run_microbatch


def run(ctx, answer=pictures_of):
    ctx.generator.answer = answer
    return process_queue(ctx, stopping=lambda: False)


def open_dispatches(ctx):
    with ctx.sessions.begin() as session:
        running = select(func.count()).select_from(Dispatch).where(Dispatch.status == "running")
        return session.scalar(running)


def test_a_pump_draws_until_nothing_is_left(ctx, queue_jobs):
    ids = queue_jobs(*[{"width": 64, "height": 64}] * 19)

    assert run(ctx) == 3
    assert {job(ctx, job_id).status for job_id in ids} == {"succeeded"}
    assert open_dispatches(ctx) == 0


def test_a_picture_of_the_wrong_size_is_an_error_never_a_result(ctx, queue_jobs):
    right, wrong = queue_jobs({}, {})

    def answer(microbatch):
        return [pictures_of(microbatch)[0], Image(np.zeros((8, 8, 3), np.uint8), 1)]

    run(ctx, answer)
    assert job(ctx, right).status == "succeeded"
    assert (job(ctx, wrong).status, job(ctx, wrong).error_code) == ("failed", "invalid_output")


def test_a_mishap_fails_its_own_job_only(ctx, queue_jobs):
    good, bad = queue_jobs({}, {})
    run(ctx, lambda asked: [pictures_of(asked)[0], RowFailed("not_finite", "not a number")])

    assert job(ctx, good).status == "succeeded"
    assert (job(ctx, bad).status, job(ctx, bad).error_code) == ("failed", "not_finite")


@pytest.mark.parametrize("answer", [lambda _: [], lambda _: MicrobatchCrashed("died")])
def test_a_crash_or_too_few_answers_make_suspects(ctx, queue_jobs, answer):
    [job_id] = queue_jobs({})
    ctx.generator.answer = answer
    for _ in range(3):
        process_queue(ctx, stopping=lambda: False)

    ended = job(ctx, job_id)
    assert (ended.status, ended.error_code, ended.attempt) == ("failed", "worker_crashed", 3)
    assert open_dispatches(ctx) == 0


@pytest.mark.parametrize("place", [0, 7])
def test_an_answer_for_nobody_makes_suspects_of_who_has_none(ctx, queue_jobs, place):
    ids = queue_jobs(*[{}] * 2)

    def answer(asked):
        picture = pictures_of(asked)[0]
        return [Finished(0, picture), Finished(place, picture), Finished(1, picture)]

    ctx.generator.answer = answer
    run_microbatch(ctx, claim(ctx, None))
    assert [job(ctx, job_id).status for job_id in ids] == ["succeeded", "queued"]


def test_who_was_drawn_before_the_crash_is_no_suspect(ctx, queue_jobs):
    ids = queue_jobs(*[{}] * 3)
    ctx.generator.answer = lambda asked: [pictures_of(asked)[0], MicrobatchCrashed("died")]
    run_microbatch(ctx, claim(ctx, None))

    drawn, *suspects = (job(ctx, job_id) for job_id in ids)
    assert (drawn.status, drawn.isolation_group) == ("succeeded", "")
    assert [suspect.status for suspect in suspects] == ["queued"] * 2
    assert all(suspect.isolation_group for suspect in suspects)


def test_nobody_is_drawn_beside_suspects(ctx, queue_jobs):
    queue_jobs(*[{}] * 3)
    run(ctx, lambda asked: MicrobatchCrashed("died") if len(asked) == 3 else pictures_of(asked))
    assert list(zip(ctx.generator.calls, ctx.generator.alone, strict=True)) == [
        (3, False),
        (2, True),
        (1, True),
    ]


@pytest.mark.parametrize("place", [0, 7, 11])
def test_of_two_microbatches_that_a_poison_takes_down_it_alone_fails(ctx, queue_jobs, place):
    """The second had joined the first, so the crash was both of theirs."""
    prompts = [{"prompt": "poison" if at == place else "a cat"} for at in range(16)]
    ids = queue_jobs(*prompts)
    ctx.generator.answer = lambda _: MicrobatchCrashed("died")
    together = [claim(ctx, None), claim(ctx, None)]
    for microbatch in together:
        run_microbatch(ctx, microbatch)
    assert ctx.generator.calls == [8, 8]

    def answer(asked):
        deadly = any(params.prompt == "poison" for params in asked)
        return MicrobatchCrashed("died") if deadly else pictures_of(asked)

    run(ctx, answer)
    assert ctx.generator.alone == [False] * 2 + [True] * (len(ctx.generator.calls) - 2)
    ended = [job(ctx, job_id) for job_id in ids]
    poison = ended.pop(place)
    assert (poison.status, poison.error_code, poison.attempt) == ("failed", "worker_crashed", 3)
    assert {one.status for one in ended} == {"succeeded"}
    assert sorted({one.attempt for one in ended}) == [2, 3]  # a half of four was there twice
    assert open_dispatches(ctx) == 0


def test_who_was_drawn_before_the_replica_left_stays_drawn(ctx, queue_jobs):
    ids = queue_jobs(*[{}] * 2)
    with pytest.raises(GeneratorUnavailable):
        run(ctx, lambda asked: [pictures_of(asked)[0], GeneratorUnavailable("it left")])

    assert [job(ctx, job_id).status for job_id in ids] == ["succeeded", "queued"]


def roomy_for(most):
    """Draws so many together and no more."""

    def answer(asked):
        crowd = len(asked) > most
        return [OutOfMemory()] * len(asked) if crowd else pictures_of(asked)

    return answer


def test_a_microbatch_that_finds_no_memory_is_halved_until_it_fits(ctx, queue_jobs):
    ids = queue_jobs(*[{}] * 7)
    run(ctx, roomy_for(2))

    assert ctx.generator.calls == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert {job(ctx, job_id).status for job_id in ids} == {"succeeded"}
    assert {job(ctx, job_id).attempt for job_id in ids} == {1}
    assert {job(ctx, job_id).requeue_count for job_id in ids} == {0}


def test_what_fits_is_remembered_for_its_kind_alone(ctx, queue_jobs):
    queue_jobs(*[{}] * 4)
    run(ctx, roomy_for(2))
    queue_jobs(*[{}] * 4)
    run(ctx)
    queue_jobs(*[{"width": 64}] * 4)
    run(ctx)

    assert ctx.generator.calls == [4, 2, 2, 2, 2, 4]


def test_who_fitted_is_not_drawn_again_with_those_who_did_not(ctx, queue_jobs):
    ids = queue_jobs(*[{}] * 3)

    def answer(asked):
        if len(asked) == 3:
            return [pictures_of(asked)[0], OutOfMemory(), OutOfMemory()]
        return pictures_of(asked)

    run(ctx, answer)
    assert ctx.generator.calls == [3, 1, 1]
    assert {job(ctx, job_id).status for job_id in ids} == {"succeeded"}


def test_a_picture_that_does_not_even_fit_alone_fails(ctx, queue_jobs):
    [job_id] = queue_jobs({})
    run(ctx, roomy_for(0))

    ended = job(ctx, job_id)
    assert (ended.status, ended.error_code) == ("failed", "out_of_memory")


def test_a_job_that_is_left_out_though_nobody_asked_goes_back(ctx, queue_jobs):
    ids = queue_jobs({}, {})
    run(ctx, lambda asked: [pictures_of(asked)[0], Canceled()])

    assert [job(ctx, job_id).status for job_id in ids] == ["succeeded", "queued"]
    assert job(ctx, ids[1]).requeue_count == 1


def test_a_job_that_is_canceled_as_it_is_stored_leaves_no_image(ctx, queue_jobs, s3_objects):
    kept, unwanted = queue_jobs({}, {})

    def answer(asked):
        cancel(ctx, unwanted)
        return pictures_of(asked)

    run(ctx, answer)
    assert job(ctx, unwanted).status == "canceled"
    assert s3_objects() == [job(ctx, kept).image_key]


def test_a_picture_that_comes_too_late_is_not_left_in_the_store(ctx, queue_jobs, s3_objects):
    [job_id] = queue_jobs({})

    def answer(asked):
        with ctx.sessions.begin() as session:
            session.execute(update(Dispatch).values(status="expired", finished_at=func.now()))
        return pictures_of(asked)

    run(ctx, answer)
    assert job(ctx, job_id).status == "running"  # until the sweeper sees to it
    assert s3_objects() == []


def test_steps_are_published_while_it_is_drawn(ctx, queue_jobs, redis_url):
    [job_id] = queue_jobs({"num_inference_steps": 9})
    seen = []

    def answer(asked):
        yield Progress({0: (4, 9)})
        deadline = time.monotonic() + 20
        with Redis.from_url(redis_url) as board:
            while not seen and time.monotonic() < deadline:
                seen.extend(progress.read(board, [job(ctx, job_id)]).values())
        yield from pictures_of(asked)

    run(ctx, answer)
    assert seen == [(4, 9)]
    assert job(ctx, job_id).status == "succeeded"


def test_a_frozen_redis_does_not_slow_the_drawing(ctx, queue_jobs, redis_server):
    [job_id] = queue_jobs({})
    redis_server.freeze()
    steps = [Progress({0: (step, 50)}) for step in range(50)]
    run(ctx, lambda asked: [*steps, Finished(0, pictures_of(asked)[0])])

    assert job(ctx, job_id).status == "succeeded"


def test_without_a_replica_the_jobs_go_back_and_lose_no_attempt(ctx, queue_jobs):
    [job_id] = queue_jobs({})
    with pytest.raises(GeneratorUnavailable):
        run(ctx, lambda _: GeneratorUnavailable("no replica"))

    waiting = job(ctx, job_id)
    assert (waiting.status, waiting.attempt, waiting.requeue_count) == ("queued", 0, 1)
    assert open_dispatches(ctx) == 0


def test_a_store_that_fails_in_mid_drawing_sends_the_job_back(ctx, queue_jobs, s3_server):
    [job_id] = queue_jobs({})

    def answer(microbatch):
        s3_server.kill()
        return pictures_of(microbatch)

    run(ctx, answer)
    waiting = job(ctx, job_id)
    assert (waiting.status, waiting.attempt, waiting.requeue_count) == ("queued", 0, 1)


def test_nothing_is_claimed_that_could_not_be_stored(ctx, queue_jobs, s3_server):
    [job_id] = queue_jobs({})
    s3_server.kill()
    with pytest.raises(StorageUnavailable):
        run(ctx)
    assert (job(ctx, job_id).status, job(ctx, job_id).requeue_count) == ("queued", 0)


def test_a_worker_whose_cluster_is_gone_leaves_at_the_second_time(ctx, queue_jobs):
    queue_jobs({})
    left = []
    crew = WorkerProcess(ctx, helpers=[], grace_s=5, leave=lambda: left.append(True))
    ctx.generator.answer = lambda _: GeneratorGone("no cluster")
    for expected in ([], [True]):
        with ctx.sessions.begin() as session:
            session.execute(update(Job).values(scheduled_at=func.now() - timedelta(seconds=1)))
        run_process_queue(crew)
        assert left == expected
