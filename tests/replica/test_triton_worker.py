"""The worker on a real Triton: events, joining, admission and cancellation."""

import asyncio
import time
import uuid
from dataclasses import replace

import numpy as np
import pytest

from tests.support.generation_runs import LONG, GenerationRun, generated, kinds, occupied, params
from workers.generation.generator import (
    Accepted,
    Canceled,
    Finished,
    Image,
    Progress,
    RowFailed,
    Started,
)
from workers.replica.triton_worker import TritonWorker


def test_a_microbatch_is_accepted_started_and_finished_row_by_row(worker, run):
    async def events():
        generation = GenerationRun(worker, params(), params(num_inference_steps=5))
        await generation.results()
        return generation.events

    first, second, *others = run(events())
    assert (first, second) == (Accepted(), Started())
    assert [event.index for event in others if isinstance(event, Finished)] == [0, 1]
    steps = [event.steps for event in others if isinstance(event, Progress)]
    assert steps[0] in ({0: (1, 2)}, {1: (1, 5)})  # of either row
    assert all(step <= total for reported in steps for step, total in reported.values())


def test_a_canceled_job_leaves_and_the_others_are_generated_as_ever(worker, run):
    others = [params(seed=7), params(seed=8, num_inference_steps=6)]

    async def one_canceled():
        generation = GenerationRun(worker, params(num_inference_steps=LONG), *others)
        await generation.has(Progress)
        assert generation.cancel_rows(0)
        return await generation.results()

    with_canceled, alone = run(one_canceled()), run(generated(worker, *others))
    assert kinds(with_canceled) == {0: Canceled, 1: Image, 2: Image}
    for index in (0, 1):
        difference = with_canceled[index + 1].pixels.astype(int) - alone[index].pixels
        assert abs(difference).max() <= 1


def test_a_microbatch_joins_the_running_one(worker, run):
    wanted = params(seed=7, num_inference_steps=6)

    async def joined():
        long = GenerationRun(worker, params(num_inference_steps=LONG))
        await long.has(Progress)
        results = await generated(worker, wanted)
        assert not long.count(Finished)
        assert long.cancel_rows(0)
        return results, await long.results()

    results, long = run(joined())
    assert kinds(long) == {0: Canceled}
    alone = run(generated(worker, wanted))
    assert abs(results[0].pixels.astype(int) - alone[0].pixels).max() <= 1


def test_a_suspect_is_generated_without_other_microbatches(worker, run):
    async def isolated():
        long = await occupied(worker)
        suspect = GenerationRun(worker, params(num_inference_steps=LONG), alone=True)
        await suspect.has(Accepted)
        other = GenerationRun(worker, params())
        for generation in long:
            assert not suspect.count(Started)
            generation.cancel_rows(0)
            await generation.results()
        await suspect.has(Progress, times=3)
        assert not other.count(Started)
        suspect.cancel_rows(0)
        return await suspect.results(), await other.results()

    suspect, other = run(isolated())
    assert kinds(suspect) == {0: Canceled}
    assert kinds(other) == {0: Image}


def test_a_microbatch_that_waits_in_the_model_does_not_count_as_hung(worker, run, monkeypatch):
    impatient = replace(worker._options, step_timeout_s=3)
    monkeypatch.setattr(worker, "_options", impatient)

    async def waited():
        first = GenerationRun(worker, params(num_inference_steps=LONG))
        await first.has(Progress)
        wide = params(width=128), params(width=128, num_inference_steps=LONG)
        second = GenerationRun(worker, *wide)
        begun = time.monotonic()
        while time.monotonic() - begun <= impatient.step_timeout_s:
            await second.has(Started, times=second.count(Started) + 1)
        assert not second.count(Progress)
        assert second.cancel_rows(1)
        await second.has(Finished)
        assert first.cancel_rows(0)
        return await second.results()

    assert kinds(run(waited())) == {0: Image, 1: Canceled}


def test_the_models_card_sets_the_widest_batch(run, options):
    narrow = TritonWorker(
        replace(options, model=options.model.model_copy(update={"max_unet_rows": 2}))
    )
    run(narrow.start())

    async def progress():
        generation = GenerationRun(narrow, *[params(num_inference_steps=LONG)] * 2)
        await generation.has(Progress, times=4)
        events = [event for event in generation.events if isinstance(event, Progress)]
        generation.task.cancel()
        return events

    reported = [set(event.steps) for event in run(progress())]
    run(narrow.stop())
    assert len(reported[0]) == 1
    assert all(rows == reported[0] for rows in reported)  # the other one waits


def test_waiting_for_room_does_not_count_as_inference(worker, run, monkeypatch):
    async def slowly(*_):
        for _ in range(12):
            await asyncio.sleep(0.1)
            yield {"started": np.array([1])}
        yield {"image": np.zeros((64, 64, 3), np.uint8)}

    monkeypatch.setattr(worker, "_options", replace(worker._options, timeout_s=1))
    monkeypatch.setattr(worker._host, "infer", slowly)
    results = run(generated(worker, params()))
    assert kinds(results) == {0: Image}
    assert results[0].inference_ms < 1000


def test_a_microbatch_that_waits_in_the_model_can_be_canceled(worker, run):
    async def canceled():
        first = GenerationRun(worker, params(num_inference_steps=LONG))
        await first.has(Progress)
        second = GenerationRun(worker, params(width=128, num_inference_steps=LONG))
        await second.has(Started, times=2)
        second.task.cancel()
        third = await generated(worker, params())  # would otherwise wait behind the second
        assert not first.count(Finished)
        first.cancel_rows(0)
        await first.results()
        return third

    assert kinds(run(canceled())) == {0: Image}


def test_a_job_can_be_canceled_while_its_microbatch_waits_for_admission(worker, run):
    async def canceled_before_admission():
        long = await occupied(worker)
        third = GenerationRun(worker, params(num_inference_steps=LONG), params())
        await third.has(Accepted)
        assert third.cancel_rows(0)
        for generation in long:
            assert generation.cancel_rows(0)
            await generation.results()
        return await third.results(), third.events

    third, events = run(canceled_before_admission())
    assert kinds(third) == {0: Canceled, 1: Image}
    assert events[2] == Finished(0, Canceled())  # before any step


def test_the_jobs_of_an_unknown_call_cannot_be_canceled(worker, run):
    async def afterwards():
        generation = GenerationRun(worker, params())
        await generation.results()
        return generation.cancel_rows(0)

    assert not run(afterwards())
    assert not worker.cancel_rows(uuid.uuid4().hex, [0])


@pytest.mark.parametrize("at", [Accepted, Progress])
def test_a_canceled_microbatch_makes_room_for_the_next(worker, run, at):
    async def canceled_then_another():
        first, other = await occupied(worker)
        third = GenerationRun(worker, params(num_inference_steps=LONG))
        await third.has(Accepted)
        fourth = GenerationRun(worker, params())
        to_cancel = [third, first] if at is Accepted else [first, third]
        for generation in to_cancel:
            await generation.has(at)
            generation.task.cancel()
        results = await fourth.results()
        assert not other.count(Finished)
        other.task.cancel()
        return results

    assert kinds(run(canceled_then_another())) == {0: Image}
    assert kinds(run(generated(worker, params()))) == {0: Image}
    assert not worker._calls


def test_a_model_without_output_for_a_job_fails_that_job(worker, run, monkeypatch):
    async def nothing(*_):
        for _ in ():
            yield {}

    monkeypatch.setattr(worker._host, "infer", nothing)
    assert kinds(run(generated(worker, params()))) == {0: RowFailed}
