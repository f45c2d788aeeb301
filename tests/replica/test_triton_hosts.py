"""Requests to the real model on a real Triton, for every way to host one."""

import asyncio
import contextlib
import time
from typing import Any

import numpy as np
import pytest

from tests.support.triton_hosts import responses, row, texts
from workers.replica.model_host import BadRequest, ModelFailed, ModelHost
from workers.replica.row_requests import TRITON_MODEL

LONG = 900  #: steps: some 30 s


def steps_of(answers: list[Any]) -> list[list[int]]:
    return [answer["step"].tolist() for answer in answers if "step" in answer]


def test_a_row_streams_its_steps_and_then_its_image(host, run):
    *steps, last = run(responses(host, row(steps=3)))
    assert steps_of(steps) == [[1, 3], [2, 3], [3, 3]]
    image = last["image"]
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    assert image.flags.owndata
    assert image.flags.writeable


def test_a_short_row_does_not_wait_for_a_long_one(host, run):
    async def first_finished() -> list[int]:
        finished: list[int] = []

        async def one(steps: int) -> None:
            await responses(host, row(steps=steps))
            finished.append(steps)

        await asyncio.gather(one(40), one(1))
        return finished

    assert run(first_finished()) == [1, 40]


def test_a_row_with_invalid_params_does_not_fail_others(host, run):
    async def both() -> list[Any]:
        return await asyncio.gather(
            responses(host, row(scheduler=texts("plms"))), responses(host, row())
        )

    [failed], sound = run(both())
    assert failed["error"][0] == b"invalid_params"
    assert b"plms" in failed["error"][1]
    assert "image" in sound[-1]


def test_text_that_is_not_english_reaches_the_model(host, run):
    prompt = np.array(["ein Leuchtturm im Nebel \u706f\u53f0".encode()], np.object_)
    assert "image" in run(responses(host, row(prompt=prompt)))[-1]


def without(name: str) -> dict[str, np.ndarray]:
    return {key: array for key, array in row().items() if key != name}


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        (without("seed"), "needs seed"),
        (row(typo=np.zeros(1, np.int32)), "no input typo"),
        (row(seed=np.zeros(1, np.int32)), "seed is int32, not int64"),
        (row(prompt=np.array(["text"])), "not object"),
        (row(width=np.full((1, 1), 64, np.int32)), "shape"),
        (row(width=np.full(2, 64, np.int32)), "shape"),
    ],
)
def test_a_bad_request_is_rejected_before_triton_sees_it(host, run, inputs, complaint):
    with pytest.raises(BadRequest, match=complaint):
        run(responses(host, inputs))
    run(host.check())


def test_a_model_that_is_not_loaded_is_a_bad_request(host, run):
    with pytest.raises(BadRequest, match="not loaded"):
        run(responses(host, {}, "unet"))


def test_a_model_that_does_not_exist_does_not_load(host, run):
    with pytest.raises(ModelFailed):
        run(host.load("no_such_model"))
    run(host.check())


def test_generation_stops_soon_after_its_request_is_canceled(host, run):
    async def first_answer_only() -> None:
        async with contextlib.aclosing(host.infer(TRITON_MODEL, row(steps=LONG))) as answers:
            await anext(answers)

    async def wide_row() -> list[Any]:
        return await responses(host, row(width=np.array([128], np.int32)))

    started = time.monotonic()
    run(first_answer_only())
    run(wide_row())  # waits until the other size is finished
    assert time.monotonic() - started < 10  # 900 steps take some 30 s


async def beside_a_long_one(host: ModelHost, wanted: dict[str, np.ndarray]) -> list[Any]:
    """Return the responses to `wanted`, sent while a row of many steps is generated."""
    async with contextlib.aclosing(host.infer(TRITON_MODEL, row(steps=LONG))) as long:
        for _ in range(3):
            await anext(long)
        answers = await responses(host, wanted)
        reached = await anext(long)
        assert reached["step"][0] < LONG
        return answers


def test_a_request_joins_the_running_batch_and_its_image_is_the_same(host, run):
    wanted = row(steps=4)
    joined = run(beside_a_long_one(host, wanted))
    alone = run(responses(host, wanted))

    assert steps_of(joined) == steps_of(alone)
    assert np.abs(joined[-1]["image"].astype(int) - alone[-1]["image"]).max() <= 1


def test_a_request_that_waits_for_room_says_so_and_can_be_canceled(host, run):
    async def canceled_while_waiting() -> None:
        async with contextlib.AsyncExitStack() as running:
            for width in (64, 96):  # one after the other: a GPU finishes one in two seconds
                long = row(steps=LONG, width=np.array([width], np.int32))
                request = contextlib.aclosing(host.infer(TRITON_MODEL, long))
                await anext(await running.enter_async_context(request))
            wide = host.infer(TRITON_MODEL, row(width=np.array([128], np.int32)))
            async with contextlib.aclosing(wide) as waiting:
                answer = await anext(waiting)
                assert answer.keys() == {"started"}

    run(canceled_while_waiting())
    assert "image" in run(responses(host, row()))[-1]
    run(host.check())


def test_each_of_many_requests_gets_its_own_responses(host, run):
    def each(seed: int) -> dict[str, np.ndarray]:
        width = 64 if seed % 5 else 128
        return row(
            steps=1 + seed % 4,
            seed=np.array([seed], np.int64),
            width=np.array([width], np.int32),
        )

    async def many() -> list[list[Any]]:
        return await asyncio.gather(*(responses(host, each(seed)) for seed in range(24)))

    for seed, answers in enumerate(run(many())):
        steps = 1 + seed % 4
        assert steps_of(answers) == [[step, steps] for step in range(1, 1 + steps)]
        image = answers[-1]["image"]
        assert image.shape == (64, 64 if seed % 5 else 128, 3)
        if seed % 6 == 0:
            [again] = run(responses(host, each(seed)))[-1:]
            assert np.abs(image.astype(int) - again["image"]).max() <= 1
