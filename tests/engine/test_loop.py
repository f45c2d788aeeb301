"""The inference loop in its thread: requests join at any time and get their own rows' events."""

import threading
from collections.abc import Callable, Collection, Iterator

import pytest

from engine.loop import InferenceLoop
from engine.requests import Image, Row, RowEvent, Started, Step
from engine.torch_runner import TorchRunner
from tests.support.engine_requests import DEMO, alone, canceled_rows, images, levels_apart, row

LONG = 900  #: steps: far more than any test waits for
DEADLINE_S = 30


class Request:
    """A submitted request, its events and its end."""

    def __init__(self, loop: InferenceLoop, *rows: Row) -> None:
        self.events: list[RowEvent] = []
        self.rows_to_cancel: Collection[int] = ()
        self.error: Exception | None = None
        self._is_closed = False
        self._happened = threading.Condition()
        loop.submit(rows, self)

    def canceled(self) -> Collection[int]:
        return self.rows_to_cancel

    def send(self, event: RowEvent) -> None:
        with self._happened:
            self.events.append(event)
            self._happened.notify_all()

    def close(self, error: Exception | None) -> None:
        with self._happened:
            assert not self._is_closed
            self.error, self._is_closed = error, True
            self._happened.notify_all()

    def _wait(self, claim: Callable[[], bool]) -> None:
        with self._happened:
            assert self._happened.wait_for(claim, DEADLINE_S)

    def has_done(self, step: int) -> None:
        """Wait until a row has done this step."""
        self._wait(lambda: any(isinstance(e, Step) and e.step >= step for e in self.events))

    def has_event(self, kind: type[RowEvent], times: int = 1) -> None:
        self._wait(lambda: sum(isinstance(e, kind) for e in self.events) >= times)

    def finished(self) -> list[RowEvent]:
        self._wait(lambda: self._is_closed)
        return self.events


@pytest.fixture(scope="module")
def runner() -> TorchRunner:
    return TorchRunner.load(DEMO, threads=1)


@pytest.fixture
def loop(runner) -> Iterator[InferenceLoop]:
    loop = InferenceLoop(runner, max_unet_rows=4)
    thread = threading.Thread(target=loop.run)
    thread.start()
    yield loop
    loop.stop()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def test_a_request_joins_the_running_batch(loop, runner):
    long = Request(loop, row(num_inference_steps=LONG))
    long.has_done(2)
    short = Request(loop, row(seed=4))
    finished = short.finished()
    assert not images(long.events)
    long.rows_to_cancel = {0}
    assert canceled_rows(long.finished()) == [0]

    assert [event for event in finished if isinstance(event, Step)] == [
        Step(0, step, 3) for step in (1, 2, 3)
    ]
    assert levels_apart(images(finished)[0], alone(runner, row(seed=4))) <= 1


def test_a_request_that_waits_for_room_gets_started_events(loop):
    long = Request(loop, *[row(num_inference_steps=LONG)] * 2)
    long.has_done(1)
    waiting = Request(loop, row(num_inference_steps=2))
    waiting.has_event(Started, times=3)
    assert set(waiting.events) == {Started(0)}
    long.rows_to_cancel = {1}  # now there is room

    last = waiting.finished()[-1]
    assert isinstance(last, Image)
    long.rows_to_cancel = {0, 1}
    long.finished()


def test_a_request_can_be_canceled_while_it_waits_for_room(loop):
    long = Request(loop, *[row(num_inference_steps=LONG)] * 2)
    long.has_done(1)
    waiting = Request(loop, row(), row(seed=2))
    waiting.has_event(Started)
    waiting.rows_to_cancel = {0, 1}
    assert canceled_rows(waiting.finished()) == [0, 1]
    assert not canceled_rows(long.events)
    long.rows_to_cancel = {0, 1}
    long.finished()


def test_a_request_without_rows_is_closed_at_once(loop):
    assert Request(loop).finished() == []


def test_a_bug_before_a_request_joins_fails_only_that_request(loop, monkeypatch):
    monkeypatch.setenv("DARKROOM_FAULT_RAISE", "cyanide")
    long = Request(loop, row(num_inference_steps=LONG))
    long.has_done(1)
    poison = Request(loop, row("cyanide"))
    poison.finished()
    assert "a bug" in str(poison.error)
    before = len(long.events)
    long.has_done(before + 2)
    long.rows_to_cancel = {0}
    long.finished()
    assert long.error is None


class BreakableRunner:
    """The real networks, which fail once when told to."""

    def __init__(self, runner: TorchRunner) -> None:
        self._runner = runner
        self.is_broken = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)

    def unet(self, *inputs: object) -> object:
        if self.is_broken:
            self.is_broken = False
            raise RuntimeError("the device failed")
        return self._runner.unet(*inputs)  # type: ignore[arg-type]


def test_an_error_in_a_step_fails_all_active_requests_and_spares_the_waiting(runner):
    breakable = BreakableRunner(runner)
    loop = InferenceLoop(breakable, max_unet_rows=4)  # type: ignore[arg-type]
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        first = Request(loop, row(num_inference_steps=LONG))
        second = Request(loop, row(num_inference_steps=LONG))
        waiting = Request(loop, row(seed=5))
        first.has_done(1)
        second.has_done(1)
        waiting.has_event(Started)
        breakable.is_broken = True
        for request in (first, second):
            request.finished()
            assert "the device failed" in str(request.error)
        assert list(images(waiting.finished())) == [0]
        assert waiting.error is None
    finally:
        loop.stop()
        thread.join(DEADLINE_S)
