"""The drawing loop in its thread: calls come when they like, and each hears of its own rows."""

import threading
import time
from collections.abc import Callable, Collection, Iterator

import pytest

from engine.loop import WAITING_REPORTED_S, InferenceLoop
from engine.requests import Event, Image, Row, Step
from engine.torch_runner import TorchRunner
from tests.support.engine_requests import DEMO, alone, levels_apart, mishaps, pictures, row

LONG = 900  #: steps: far more than any test waits for
DEADLINE_S = 30


class Asking:
    """A call, and all that it was told."""

    def __init__(self, loop: InferenceLoop, *rows: Row) -> None:
        self.told: list[Event] = []
        self.gone: Collection[int] = ()
        self.failure: Exception | None = None
        self._has_ended = False
        self._happened = threading.Condition()
        loop.ask(rows, self)

    def withdrawn(self) -> Collection[int]:
        return self.gone

    def tell(self, event: Event) -> None:
        with self._happened:
            self.told.append(event)
            self._happened.notify_all()

    def end(self, failure: Exception | None) -> None:
        with self._happened:
            assert not self._has_ended
            self.failure, self._has_ended = failure, True
            self._happened.notify_all()

    def _wait(self, claim: Callable[[], bool]) -> None:
        with self._happened:
            assert self._happened.wait_for(claim, DEADLINE_S)

    def has_done(self, step: int) -> None:
        """Wait until its first row has."""
        self._wait(lambda: any(isinstance(e, Step) and e.step >= step for e in self.told))

    def ended(self) -> list[Event]:
        self._wait(lambda: self._has_ended)
        return self.told


@pytest.fixture(scope="module")
def runner() -> TorchRunner:
    return TorchRunner.load(DEMO, threads=1)


@pytest.fixture
def loop(runner) -> Iterator[InferenceLoop]:
    drawing = InferenceLoop(runner, max_unet_rows=4)
    thread = threading.Thread(target=drawing.run)
    thread.start()
    yield drawing
    drawing.stop()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def test_a_call_that_comes_while_another_is_drawn_joins_it(loop, runner):
    long = Asking(loop, row(num_inference_steps=LONG))
    long.has_done(2)
    short = Asking(loop, row(seed=4))
    drawn = short.ended()
    assert not pictures(long.told)
    long.gone = {0}
    assert mishaps(long.ended()) == {0: "canceled"}

    assert [event for event in drawn if isinstance(event, Step)] == [
        Step(0, step, 3) for step in (1, 2, 3)
    ]
    assert levels_apart(pictures(drawn)[0], alone(runner, row(seed=4))) <= 1


def test_a_call_that_waits_for_a_seat_is_told_so_now_and_then(loop):
    long = Asking(loop, *[row(num_inference_steps=LONG)] * 2)
    long.has_done(1)
    waiting = Asking(loop, row(num_inference_steps=2))
    waiting.has_done(0)
    time.sleep(2.5 * WAITING_REPORTED_S)
    assert len(waiting.told) >= 2
    assert set(waiting.told) == {Step(0, 0, 2)}
    long.gone = {1}  # there is a seat

    last = waiting.ended()[-1]
    assert isinstance(last, Image)
    long.gone = {0, 1}
    long.ended()


def test_a_call_can_be_withdrawn_while_it_waits_for_a_seat(loop):
    long = Asking(loop, *[row(num_inference_steps=LONG)] * 2)
    long.has_done(1)
    waiting = Asking(loop, row(), row(seed=2))
    waiting.has_done(0)
    waiting.gone = {0, 1}
    assert mishaps(waiting.ended()) == {0: "canceled", 1: "canceled"}
    assert not mishaps(long.told)
    long.gone = {0, 1}
    long.ended()


def test_nothing_asked_is_answered_at_once(loop):
    assert Asking(loop).ended() == []


def test_a_bug_that_a_prompt_meets_before_it_joins_is_its_own(loop, monkeypatch):
    monkeypatch.setenv("DARKROOM_FAULT_RAISE", "cyanide")
    long = Asking(loop, row(num_inference_steps=LONG))
    long.has_done(1)
    poison = Asking(loop, row("cyanide"))
    poison.ended()
    assert "a bug" in str(poison.failure)
    before = len(long.told)
    long.has_done(before + 2)
    long.gone = {0}
    long.ended()
    assert long.failure is None


class Faulty:
    """The real networks, until they break."""

    def __init__(self, runner: TorchRunner) -> None:
        self._runner = runner
        self.is_broken = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)

    def unet(self, *inputs: object) -> object:
        if self.is_broken:
            self.is_broken = False
            raise RuntimeError("the device has lost its mind")
        return self._runner.unet(*inputs)  # type: ignore[arg-type]


def test_what_breaks_in_a_step_fails_all_who_took_part_and_the_next_are_drawn(runner):
    faulty = Faulty(runner)
    drawing = InferenceLoop(faulty, max_unet_rows=4)  # type: ignore[arg-type]
    thread = threading.Thread(target=drawing.run)
    thread.start()
    try:
        first = Asking(drawing, row(num_inference_steps=LONG))
        second = Asking(drawing, row(num_inference_steps=LONG))
        waiting = Asking(drawing, row(seed=5))
        first.has_done(1)
        second.has_done(1)
        waiting.has_done(0)
        faulty.is_broken = True
        for one in (first, second):
            one.ended()
            assert "lost its mind" in str(one.failure)
        assert list(pictures(waiting.ended())) == [0]
        assert waiting.failure is None
    finally:
        drawing.stop()
        thread.join(DEADLINE_S)
