"""Translation of the model's responses into a worker's events."""

import time
from collections.abc import Mapping
from typing import Final

from darkroom.jobs.progress import Steps
from workers.generation.generator import (
    Canceled,
    Finished,
    GenerationEvent,
    Image,
    OutOfMemory,
    Progress,
    RowFailed,
    RowResult,
    Started,
)
from workers.replica.row_requests import Response

REPORT_EVERY_S: Final = 0.25  #: at most so often, and at once after a microbatch's first step

#: the model's codes that do not fail the job
_ERROR_CODES: Final[Mapping[str, RowResult]] = {"out_of_memory": OutOfMemory()}


class ResponseTranslator:
    """Translator of one microbatch's responses, which merges its many steps into few events."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._reported = 0.0
        self._steps: dict[int, Steps] = {}
        self._in_batch: set[int] = set()  # rows that have stepped and do not wait again

    def event(self, index: int, response: Response) -> GenerationEvent | None:
        """Return the event to report now: Started while no row is in the model's batch."""
        if "started" in response:
            self._in_batch.discard(index)
            return self._waiting()
        if "step" in response:
            self._in_batch.add(index)
            step, steps = response["step"].tolist()
            return self._step(index, (step, steps))
        self._in_batch.discard(index)
        return Finished(index, self._result(response))

    def _waiting(self) -> Started | None:
        if self._in_batch:
            return None
        self._started = time.monotonic()
        return Started()

    def _result(self, response: Response) -> RowResult:
        if "image" in response:
            elapsed_ms = round((time.monotonic() - self._started) * 1000)
            return Image(response["image"], elapsed_ms)
        if "canceled" in response:
            return Canceled()
        code, message = (text.decode() for text in response["error"])
        return _ERROR_CODES.get(code) or RowFailed(code, message)

    def _step(self, index: int, steps: Steps) -> Progress | None:
        self._steps[index] = steps
        if time.monotonic() - self._reported < REPORT_EVERY_S:
            return None
        self._reported = time.monotonic()
        reported, self._steps = self._steps, {}
        return Progress(reported)
