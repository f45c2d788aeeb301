"""Draws what is asked as it comes: who comes while others are drawn joins them at the next step."""

import time
from collections.abc import Collection, Sequence
from queue import Empty, SimpleQueue
from typing import Final, Protocol

from engine import faults
from engine.batcher import ContinuousBatch
from engine.requests import BatchRequest, Event, Row, Step
from engine.runner import NetworkRunner

WAITING_REPORTED_S: Final = 1.0  #: so often, to calls that wait for a seat: they are not forgotten


class ResponseSink(Protocol):
    """Who asked for rows, as the loop's thread speaks to it. Nothing is to be raised."""

    def withdrawn(self) -> Collection[int]:
        """Which of the rows are not to be drawn any further."""
        ...

    def tell(self, event: Event) -> None:
        """What has become of a row."""
        ...

    def end(self, failure: Exception | None) -> None:
        """That was all; with a failure, for which these rows may be the reason."""
        ...


class InferenceLoop:
    """One company of rows, which lasts as long as the model is loaded."""

    def __init__(self, runner: NetworkRunner, *, max_unet_rows: int) -> None:
        self._company = ContinuousBatch(faults.limit_rows(runner), max_unet_rows=max_unet_rows)
        self._asked: SimpleQueue[tuple[Sequence[Row], ResponseSink] | None] = SimpleQueue()
        self._askers: dict[BatchRequest, ResponseSink] = {}
        self._waiting_told = 0.0

    def ask(self, rows: Sequence[Row], asker: ResponseSink) -> None:
        """Have these rows drawn. Any thread may ask, and hears of it in the loop's."""
        self._asked.put((rows, asker))

    def stop(self) -> None:
        """Have `run` return after this step, whatever is still to be drawn."""
        self._asked.put(None)

    def run(self) -> None:
        """Draw until told to stop; in the thread that the runner belongs to."""
        while self._let_in():
            try:
                self._step()
            except Exception as failure:  # noqa: BLE001  # theirs; the next may be fine
                for call in self._company.dissolve():
                    self._askers.pop(call).end(failure)
            self._tell_who_waits()

    def _step(self) -> None:
        for call, event in self._company.step():
            self._askers[call].tell(event)
            if not call.left:
                self._askers.pop(call).end(None)

    def _let_in(self) -> bool:
        """Take in who has come, or wait for somebody; False when it is time to stop."""
        while True:
            try:
                asked = self._asked.get(block=self._company.is_empty())
            except Empty:
                return True
            if asked is None:
                return False
            self._begin(*asked)

    def _begin(self, rows: Sequence[Row], asker: ResponseSink) -> None:
        try:
            faults.inject(rows)
        except Exception as failure:  # noqa: BLE001  # this call's alone
            asker.end(failure)
            return
        if not rows:
            asker.end(None)
            return
        call = BatchRequest(rows, asker.withdrawn)
        self._askers[call] = asker
        self._company.join(call)

    def _tell_who_waits(self) -> None:
        if time.monotonic() - self._waiting_told < WAITING_REPORTED_S:
            return
        self._waiting_told = time.monotonic()
        for call in self._company.waiting():
            index = min(call.left)
            self._askers[call].tell(Step(index, 0, call.rows[index].num_inference_steps))
