"""The worker on a real Triton that is short of memory, meets a bug, hangs or dies."""

import asyncio
import os
import signal

import pytest

from darkroom.errors import GeneratorUnavailable, MicrobatchCrashed
from tests.support.generation_runs import LONG, GenerationRun, generated, kinds, occupied, params
from tests.support.triton_hosts import server_pid
from workers.generation.generator import (
    Accepted,
    Canceled,
    Image,
    OutOfMemory,
    Progress,
    Started,
)
from workers.replica.model_host import TritonUnavailable
from workers.replica.triton_runtime import stubs_of
from workers.replica.triton_worker import CHECKS_BEFORE_DEATH, CONCURRENT_MICROBATCHES


def test_jobs_that_do_not_fit_into_memory_at_once_run_one_after_the_other(low_memory_worker, run):
    for count in (2, 3):
        results = run(generated(low_memory_worker, *[params()] * count))
        assert kinds(results) == dict.fromkeys(range(count), Image)


def test_a_job_without_memory_beside_others_waits_for_it(low_memory_worker, run):
    async def joined():
        first = GenerationRun(low_memory_worker, *[params(num_inference_steps=30)] * 2)
        await first.has(Progress)
        return await generated(low_memory_worker, params()), await first.results()

    assert [kinds(results) for results in run(joined())] == [
        {0: Image},
        {0: Image, 1: Image},
    ]


def test_a_row_that_does_not_fit_alone_fails_for_lack_of_memory(one_row_worker, run):
    guided, unguided = params(guidance_scale=4.0), params(guidance_scale=1.0)

    results = run(generated(one_row_worker, guided, unguided))
    assert kinds(results) == {0: OutOfMemory, 1: Image}


def test_a_bug_that_one_prompt_triggers_is_a_crash_of_its_microbatch(low_memory_worker, run):
    with pytest.raises(MicrobatchCrashed, match="a bug"):
        run(generated(low_memory_worker, params("cyanide"), params()))
    assert kinds(run(generated(low_memory_worker, params()))) == {0: Image}


def test_a_bug_that_one_prompt_triggers_spares_other_microbatches(low_memory_worker, run):
    async def joined():
        first = GenerationRun(low_memory_worker, params(num_inference_steps=LONG))
        await first.has(Progress)
        with pytest.raises(MicrobatchCrashed, match="a bug"):
            await generated(low_memory_worker, params("cyanide"))
        assert first.cancel_rows(0)
        return await first.results()

    assert kinds(run(joined())) == {0: Canceled}


def test_a_hung_model_makes_suspects_of_all_that_are_with_it_and_spares_the_waiting(
    hanging_worker, run
):
    async def hung():
        other = GenerationRun(hanging_worker, params(num_inference_steps=LONG))
        await other.has(Progress)
        poison = GenerationRun(hanging_worker, params("cyanide"))
        await poison.has(Started)
        waiting = [
            GenerationRun(hanging_worker, params()),
            GenerationRun(hanging_worker, params(), alone=True),
        ]
        tasks = [generation.task for generation in (other, poison, *waiting)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = [type(result) for result in run(hung())]
    assert results == [MicrobatchCrashed] * 2 + [GeneratorUnavailable] * 2
    with pytest.raises(TritonUnavailable):
        run(hanging_worker.check())


def test_a_dead_model_makes_suspects_of_all_that_are_with_it(crashing_worker, run):
    async def killed():
        long = await occupied(crashing_worker)
        waiting = GenerationRun(crashing_worker, params())
        await waiting.has(Accepted)
        for stub in stubs_of(server_pid(crashing_worker._host)):
            os.kill(stub, signal.SIGKILL)
        tasks = [generation.task for generation in (*long, waiting)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = [type(result) for result in run(killed())]
    assert results == [MicrobatchCrashed] * CONCURRENT_MICROBATCHES + [GeneratorUnavailable]


def test_a_frozen_model_is_given_up_after_a_few_checks(crashing_worker, run):
    async def frozen():
        generation = GenerationRun(crashing_worker, params(num_inference_steps=LONG))
        await generation.has(Progress)
        for stub in stubs_of(server_pid(crashing_worker._host)):
            os.kill(stub, signal.SIGSTOP)
        failed = 0
        while failed < CHECKS_BEFORE_DEATH:  # a thread may be on a core until it is stopped
            try:
                await crashing_worker.check()
            except TritonUnavailable:
                failed += 1
        await generation.task

    with pytest.raises(MicrobatchCrashed):
        run(frozen())
