"""The painter on a real Triton: what becomes of its microbatches, whatever the model does."""

import asyncio
import os
import signal
import time
import uuid
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest

from darkroom.errors import GeneratorUnavailable, MicrobatchCrashed
from darkroom.generation.params import GenerationParams
from workers.generation.generator import (
    Accepted,
    Canceled,
    Finished,
    Image,
    OutOfMemory,
    Progress,
    RowFailed,
    Started,
)
from workers.replica.model_host import TritonUnavailable
from workers.replica.triton_runtime import stubs_of
from workers.replica.triton_worker import (
    CHECKS_BEFORE_DEATH,
    TOGETHER,
    TritonWorker,
    TritonWorkerOptions,
)

DEADLINE_S = 60
LONG = 900  #: steps: far more than any test waits for


@pytest.fixture(scope="module")
def run():
    """Await something on the one event loop of this module, with a deadline."""
    with asyncio.Runner() as runner:
        yield lambda coroutine: runner.run(asyncio.wait_for(coroutine, DEADLINE_S))


@pytest.fixture(scope="module")
def options(registry):
    return TritonWorkerOptions(
        model=registry.models[registry.default],
        triton_mode="auto",
        device="cpu",
        runner="torch",
        compiled_models=None,
        threads=1,
        replicas=1,
        timeout_s=DEADLINE_S,
        step_timeout_s=DEADLINE_S,
    )


@pytest.fixture(scope="module")
def painter(run, options):
    opened = TritonWorker(options)
    run(opened.start())
    yield opened
    run(opened.stop())


@pytest.fixture(scope="module")
def cramped(run, options):
    """A painter with memory for four rows of the UNet, and a model with a bug."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DARKROOM_FAULT_MAX_ROWS", "4")
        patch.setenv("DARKROOM_FAULT_RAISE", "cyanide")
        opened = TritonWorker(options)
        run(opened.start())
    yield opened
    run(opened.stop())


@pytest.fixture
def doomed(run, options, monkeypatch):
    """A painter of the test's own, whose model hangs at a word."""
    monkeypatch.setenv("DARKROOM_FAULT_HANG", "cyanide")
    opened = TritonWorker(replace(options, step_timeout_s=5))
    run(opened.start())
    yield opened
    run(opened.stop())


def asked(prompt="a lighthouse", **changed):
    plain = {"seed": 1, "num_inference_steps": 2, "guidance_scale": 4.0, "width": 64, "height": 64}
    return GenerationParams(
        prompt=prompt,
        negative_prompt="",
        model="darkroom-demo",
        output_format="png",
        **plain | changed,
    )


class Drawing:
    """A microbatch under way, and what has become of it."""

    def __init__(self, painter, *microbatch, alone=False):
        self.call_id = uuid.uuid4().hex
        self.happenings = []
        self._drawing = painter.draw(self.call_id, microbatch, alone=alone)
        self._happened = asyncio.Condition()
        self.task = asyncio.create_task(self._run())

    async def _run(self):
        async with aclosing(self._drawing) as happenings:
            async for happening in happenings:
                async with self._happened:
                    self.happenings.append(happening)
                    self._happened.notify_all()

    async def has(self, kind, times=1):
        """Wait until something of this kind has happened."""
        async with self._happened:
            await self._happened.wait_for(lambda: self.count(kind) >= times)

    def count(self, kind):
        return sum(isinstance(happening, kind) for happening in self.happenings)

    async def ended(self):
        await self.task
        return {h.index: h.result for h in self.happenings if isinstance(h, Finished)}


async def drawn(painter, *microbatch):
    return await Drawing(painter, *microbatch).ended()


def kinds(drawings):
    return {index: type(drawing) for index, drawing in drawings.items()}


def test_a_call_is_accepted_begun_and_ends_for_each(painter, run):
    async def happenings():
        drawing = Drawing(painter, asked(), asked(num_inference_steps=5))
        await drawing.ended()
        return drawing.happenings

    first, second, *others = run(happenings())
    assert (first, second) == (Accepted(), Started())
    assert [h.index for h in others if isinstance(h, Finished)] == [0, 1]
    steps = [h.steps for h in others if isinstance(h, Progress)]
    assert steps[0] == {0: (1, 2)}
    assert all(step <= of for told in steps for step, of in told.values())


def test_a_withdrawn_job_leaves_and_its_company_is_drawn_as_ever(painter, run):
    company = [asked(seed=7), asked(seed=8, num_inference_steps=6)]

    async def one_withdrawn():
        drawing = Drawing(painter, asked(num_inference_steps=LONG), *company)
        await drawing.has(Progress)
        assert painter.withdraw(drawing.call_id, [0])
        return await drawing.ended()

    accompanied, alone = run(one_withdrawn()), run(drawn(painter, *company))
    assert kinds(accompanied) == {0: Canceled, 1: Image, 2: Image}
    for place in (0, 1):
        difference = accompanied[place + 1].pixels.astype(int) - alone[place].pixels
        assert abs(difference).max() <= 1


async def busy(painter, **changed):
    """As many long microbatches as are with the model at once; they draw."""
    long = [Drawing(painter, asked(num_inference_steps=LONG, **changed)) for _ in range(TOGETHER)]
    for drawing in long:
        await drawing.has(Progress)
    return long


def test_a_microbatch_joins_the_one_that_is_drawn(painter, run):
    wanted = asked(seed=7, num_inference_steps=6)

    async def joined():
        long = Drawing(painter, asked(num_inference_steps=LONG))
        await long.has(Progress)
        drawings = await drawn(painter, wanted)
        assert not long.count(Finished)
        assert painter.withdraw(long.call_id, [0])
        return drawings, await long.ended()

    drawings, long = run(joined())
    assert kinds(long) == {0: Canceled}
    alone = run(drawn(painter, wanted))
    assert abs(drawings[0].pixels.astype(int) - alone[0].pixels).max() <= 1


def test_a_suspect_is_drawn_while_nobody_else_is(painter, run):
    async def told_apart():
        long = await busy(painter)
        suspect = Drawing(painter, asked(num_inference_steps=LONG), alone=True)
        await suspect.has(Accepted)
        other = Drawing(painter, asked())
        for drawing in long:
            assert not suspect.count(Started)
            painter.withdraw(drawing.call_id, [0])
            await drawing.ended()
        await suspect.has(Progress, times=3)
        assert not other.count(Started)
        painter.withdraw(suspect.call_id, [0])
        return await suspect.ended(), await other.ended()

    suspect, other = run(told_apart())
    assert kinds(suspect) == {0: Canceled}
    assert kinds(other) == {0: Image}


def test_who_waits_in_the_model_for_seats_is_not_taken_for_hung(painter, run, monkeypatch):
    impatient = replace(painter._options, step_timeout_s=3)
    monkeypatch.setattr(painter, "_options", impatient)

    async def waited():
        first = Drawing(painter, asked(num_inference_steps=LONG))
        await first.has(Progress)
        second = Drawing(painter, asked(width=128), asked(width=128, num_inference_steps=LONG))
        begun = time.monotonic()
        await second.has(Started, times=5)
        assert time.monotonic() - begun > impatient.step_timeout_s
        assert not second.count(Progress)
        assert painter.withdraw(second.call_id, [1])
        await second.has(Finished)
        assert painter.withdraw(first.call_id, [0])
        return await second.ended()

    assert kinds(run(waited())) == {0: Image, 1: Canceled}


def test_the_models_card_says_how_wide_a_step_is(run, options):
    narrow = TritonWorker(
        replace(options, model=options.model.model_copy(update={"max_unet_rows": 2}))
    )
    run(narrow.start())

    async def happenings():
        drawing = Drawing(narrow, asked(num_inference_steps=60), asked(num_inference_steps=60))
        await drawing.ended()
        return drawing.happenings

    happened = run(happenings())
    run(narrow.stop())
    first = next(at for at, h in enumerate(happened) if isinstance(h, Finished))
    told = [set(h.steps) for h in happened[:first] if isinstance(h, Progress)]
    assert len(told) > 1  # the first is of one row in any case
    assert all(rows == {0} for rows in told)  # the other one waited for its two rows


def test_waiting_for_seats_is_no_time_of_the_drawing(painter, run, monkeypatch):
    async def slowly(*_):
        for _ in range(12):
            await asyncio.sleep(0.1)
            yield {"index": np.array([0]), "step": np.array([0, 2])}
        yield {"index": np.array([0]), "image": np.zeros((64, 64, 3), np.uint8)}

    monkeypatch.setattr(painter, "_options", replace(painter._options, timeout_s=1))
    monkeypatch.setattr(painter._host, "infer", slowly)
    drawings = run(drawn(painter, asked()))
    assert kinds(drawings) == {0: Image}
    assert drawings[0].inference_ms < 1000


def test_a_call_that_waits_in_the_model_for_seats_can_be_canceled(painter, run):
    async def canceled():
        first = Drawing(painter, asked(num_inference_steps=LONG))
        await first.has(Progress)
        second = Drawing(painter, asked(width=128, num_inference_steps=LONG))
        await second.has(Started, times=2)
        second.task.cancel()
        third = await drawn(painter, asked())  # it would have to wait behind the second
        assert not first.count(Finished)
        painter.withdraw(first.call_id, [0])
        await first.ended()
        return third

    assert kinds(run(canceled())) == {0: Image}


def test_a_job_can_be_withdrawn_while_its_call_waits_for_its_turn(painter, run):
    async def withdrawn_in_line():
        long = await busy(painter)
        third = Drawing(painter, asked(num_inference_steps=LONG), asked())
        await third.has(Accepted)
        assert painter.withdraw(third.call_id, [0])
        for drawing in long:
            assert painter.withdraw(drawing.call_id, [0])
            await drawing.ended()
        return await third.ended(), third.happenings

    third, happenings = run(withdrawn_in_line())
    assert kinds(third) == {0: Canceled, 1: Image}
    assert happenings[2] == Finished(0, Canceled())  # before anything was drawn


def test_a_call_that_is_not_there_cannot_be_withdrawn_from(painter, run):
    async def afterwards():
        drawing = Drawing(painter, asked())
        await drawing.ended()
        return painter.withdraw(drawing.call_id, [0])

    assert not run(afterwards())
    assert not painter.withdraw(uuid.uuid4().hex, [0])


@pytest.mark.parametrize("at", [Accepted, Progress])
def test_a_canceled_call_makes_room_for_the_next(painter, run, at):
    async def canceled_then_another():
        first, other = await busy(painter)
        third = Drawing(painter, asked(num_inference_steps=LONG))
        await third.has(Accepted)
        fourth = Drawing(painter, asked())
        victims = [third, first] if at is Accepted else [first, third]
        for victim in victims:
            await victim.has(at)
            victim.task.cancel()
        drawings = await fourth.ended()
        assert not other.count(Finished)
        other.task.cancel()
        return drawings

    assert kinds(run(canceled_then_another())) == {0: Image}
    assert kinds(run(drawn(painter, asked()))) == {0: Image}
    assert not list(painter._flags.folder.iterdir())


def test_jobs_that_find_no_memory_together_are_told_so(cramped, run):
    assert kinds(run(drawn(cramped, *[asked()] * 3))) == dict.fromkeys(range(3), OutOfMemory)
    assert kinds(run(drawn(cramped, *[asked()] * 2))) == dict.fromkeys(range(2), Image)


def test_a_job_for_which_there_is_no_memory_beside_others_waits_for_it(cramped, run):
    async def joined():
        first = Drawing(cramped, *[asked(num_inference_steps=80)] * 2)
        await first.has(Progress)
        return await drawn(cramped, asked()), await first.ended()

    assert [kinds(drawings) for drawings in run(joined())] == [
        {0: Image},
        {0: Image, 1: Image},
    ]


def test_a_bug_that_one_prompt_meets_is_a_crash_after_which_it_draws_on(cramped, run):
    with pytest.raises(MicrobatchCrashed, match="a bug"):
        run(drawn(cramped, asked("cyanide"), asked()))
    assert kinds(run(drawn(cramped, asked()))) == {0: Image}


def test_a_bug_that_one_prompt_meets_is_no_crash_of_its_company(cramped, run):
    async def joined():
        first = Drawing(cramped, asked(num_inference_steps=LONG))
        await first.has(Progress)
        with pytest.raises(MicrobatchCrashed, match="a bug"):
            await drawn(cramped, asked("cyanide"))
        assert cramped.withdraw(first.call_id, [0])
        return await first.ended()

    assert kinds(run(joined())) == {0: Canceled}


def test_a_model_that_hangs_makes_suspects_of_its_company_and_fails_nobody_who_waits(doomed, run):
    async def hung():
        company = Drawing(doomed, asked(num_inference_steps=LONG))
        await company.has(Progress)
        poison = Drawing(doomed, asked("cyanide"))
        await poison.has(Started)
        waiting = [Drawing(doomed, asked()), Drawing(doomed, asked(), alone=True)]
        tasks = [drawing.task for drawing in (company, poison, *waiting)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    ended = [type(one) for one in run(hung())]
    assert ended == [MicrobatchCrashed] * 2 + [GeneratorUnavailable] * 2
    with pytest.raises(TritonUnavailable):
        run(doomed.check())


def test_a_model_that_dies_makes_suspects_of_all_that_are_with_it(doomed, run):
    async def killed():
        long = await busy(doomed)
        waiting = Drawing(doomed, asked())
        await waiting.has(Accepted)
        for stub in stubs_of(getattr(doomed._host, "_pid", os.getpid())):
            os.kill(stub, signal.SIGKILL)
        tasks = [drawing.task for drawing in (*long, waiting)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    ended = [type(one) for one in run(killed())]
    assert ended == [MicrobatchCrashed] * TOGETHER + [GeneratorUnavailable]


def test_a_frozen_model_is_given_up_after_a_few_checks(doomed, run):
    async def frozen():
        drawing = Drawing(doomed, asked(num_inference_steps=LONG))
        await drawing.has(Progress)
        for stub in stubs_of(getattr(doomed._host, "_pid", os.getpid())):
            os.kill(stub, signal.SIGSTOP)
        failed = 0
        while failed < CHECKS_BEFORE_DEATH:  # a thread may be on a core until it is stopped
            try:
                await doomed.check()
            except TritonUnavailable:
                failed += 1
        await drawing.task

    with pytest.raises(MicrobatchCrashed):
        run(frozen())


def test_a_model_that_says_nothing_of_a_job_fails_that_job(painter, run, monkeypatch):
    async def nothing(*_):
        for _ in ():
            yield {}

    monkeypatch.setattr(painter._host, "infer", nothing)
    assert kinds(run(drawn(painter, asked()))) == {0: RowFailed}
