"""The inference loop: requests join the running batch at its next step."""

import time
from collections.abc import Collection, Sequence
from queue import Empty, SimpleQueue
from typing import Final, Protocol

from engine import faults
from engine.batcher import ContinuousBatch
from engine.requests import BatchRequest, Row, RowEvent, Started
from engine.runner import NetworkRunner

LINGER_S: Final = 0.005  #: before the first step of an empty batch: a microbatch's rows come singly
WAITING_REPORT_INTERVAL_S: Final = 1.0  #: a Started this often while a request waits for room


class ResponseSink(Protocol):
    """The sender of a request, as the loop's thread calls it. No method may raise."""

    def canceled(self) -> Collection[int]:
        """Return the indices of the rows to leave out from the next step on."""
        ...

    def send(self, event: RowEvent) -> None:
        """Report an event of a row."""
        ...

    def close(self, error: Exception | None) -> None:
        """End the request; with an error, which these rows may have caused."""
        ...


class InferenceLoop:
    """One continuous batch, which lasts as long as the model is loaded."""

    def __init__(self, runner: NetworkRunner, *, max_unet_rows: int) -> None:
        self._batch = ContinuousBatch(faults.limit_rows(runner), max_unet_rows=max_unet_rows)
        self._submitted: SimpleQueue[tuple[Sequence[Row], ResponseSink] | None] = SimpleQueue()
        self._sinks: dict[BatchRequest, ResponseSink] = {}
        self._waiting_reported = 0.0

    def submit(self, rows: Sequence[Row], sink: ResponseSink) -> None:
        """Queue rows. Callable from any thread; the loop's thread calls the sink."""
        self._submitted.put((rows, sink))

    def stop(self) -> None:
        """Make `run` return after this step, also when rows are unfinished."""
        self._submitted.put(None)

    def run(self) -> None:
        """Generate until `stop`; runs in the thread that the runner belongs to."""
        while self._receive():
            try:
                self._step()
            except Exception as error:  # noqa: BLE001  # these requests'; the next may succeed
                for request in self._batch.remove_suspects():
                    self._sinks.pop(request).close(error)
            self._report_waiting()

    def _step(self) -> None:
        for request, event in self._batch.step():
            self._sinks[request].send(event)
            if not request.unfinished:
                self._sinks.pop(request).close(None)

    def _receive(self) -> bool:
        """Add new requests, and wait for some if the batch is empty. Return False to stop."""
        was_empty = self._batch.is_empty()
        while True:
            timeout_s = None if self._batch.is_empty() else LINGER_S
            try:
                submitted = self._submitted.get(block=was_empty, timeout=timeout_s)
            except Empty:
                return True
            if submitted is None:
                return False
            self._add(*submitted)

    def _add(self, rows: Sequence[Row], sink: ResponseSink) -> None:
        try:
            faults.inject(rows)
        except Exception as error:  # noqa: BLE001  # this request's alone
            sink.close(error)
            return
        if not rows:
            sink.close(None)
            return
        request = BatchRequest(rows, sink.canceled)
        self._sinks[request] = sink
        self._batch.add(request)

    def _report_waiting(self) -> None:
        if time.monotonic() - self._waiting_reported < WAITING_REPORT_INTERVAL_S:
            return
        self._waiting_reported = time.monotonic()
        for request in self._batch.waiting():
            self._sinks[request].send(Started(min(request.unfinished)))
