"""Has Celery take the next hint as soon as a pump has returned.

With `worker_disable_prefetch` a worker whose slots are all taken stops listening to Redis, and
looks whether one is free only when its event loop comes round. A thread that becomes free does
not wake the loop, and left to itself it comes round once a second: a job that is submitted just
after another was drawn would wait that long.
"""

import os
from typing import Any, Final

from celery import bootsteps, signals

_FREED_S: Final = 0.005  # from a task's return until its slot counts as free


class SlotFreedWakeup(bootsteps.StartStopStep):
    """A step of Celery's consumer: an event file that tasks write to and the loop listens to."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        # Never closed: there is one as long as the process lives, over all of its connections.
        self._freed = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        signals.task_postrun.connect(self._note, weak=False)

    def register_with_event_loop(self, consumer: Any, hub: Any) -> None:  # noqa: ARG002
        """Called by Celery before its loop begins, with each new connection to Redis."""
        hub.add_reader(self._freed, self._wake, hub)

    def _note(self, **_: object) -> None:
        os.eventfd_write(self._freed, 1)

    def _wake(self, hub: Any) -> None:
        os.eventfd_read(self._freed)
        hub.call_later(_FREED_S, _nothing)  # to come round is enough


def _nothing() -> None:
    pass
