"""Background work: one class for every thread that repeats something."""

import logging
import random
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from prometheus_client import Counter

_JITTER: Final = 0.1  #: of the interval, so that processes started together drift apart
_RETRY_S: Final = 1.0  #: a task without an interval rests so long after a failure

FAILURES: Final = Counter(
    "darkroom_background_failures", "Failed runs of a background task", ["task"]
)
logger = logging.getLogger(__name__)


class PeriodicTask:
    """Daemon thread that runs `work` every `interval` and whenever woken, until closed.

    A failure is logged, with a traceback unless it is `transient`; the thread goes on.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], None],
        *,
        interval: timedelta | None = None,
        transient: tuple[type[Exception], ...] = (),
        on_failure: str = "retrying",
    ) -> None:
        """Without an `interval`, run only when woken. `on_failure` says what happens next."""
        self.name = name
        self._work = work
        self._interval_s = None if interval is None else interval.total_seconds()
        self._transient = transient
        self._on_failure = on_failure
        self._woken = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread; its first run is after one interval."""
        self._thread.start()

    def wake(self) -> None:
        """Run `work` soon. Return at once; calls during a run become one."""
        if not self._woken.is_set():  # a look is cheap, setting wakes the waiting thread
            self._woken.set()

    def close(self, timeout: timedelta = timedelta(seconds=5)) -> None:
        """End the thread, after the run in progress if that ends within `timeout`."""
        self._closing.set()
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(timeout.total_seconds())

    def _run(self) -> None:
        while True:
            self._woken.wait(self._delay_s())
            self._woken.clear()
            if self._closing.is_set():
                return
            if not self._succeeds() and self._interval_s is None:
                self._closing.wait(_RETRY_S)

    def _delay_s(self) -> float | None:
        if self._interval_s is None:
            return None
        return self._interval_s * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311

    def _succeeds(self) -> bool:
        try:
            self._work()
        except Exception as error:  # a thread that ends unnoticed is worse
            FAILURES.labels(self.name).inc()
            trace = None if isinstance(error, self._transient) else error
            text = "background task %s failed: %s: %s; %s"
            facts = (self.name, type(error).__name__, error, self._on_failure)
            logger.warning(text, *facts, exc_info=trace)
            return False
        return True
