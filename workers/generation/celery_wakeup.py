"""Wake-up of Celery's event loop when a task has returned, to take the next hint at once.

With `worker_disable_prefetch` a worker whose slots are all taken stops listening to Redis, and
checks for a free slot only when its event loop runs. A thread that becomes free does not wake the
loop, which by itself runs once a second: a job submitted just after another one finished would
wait that long.
"""

import os
from typing import Any, Final

from celery import bootsteps, signals

_FREED_S: Final = 0.005  # from a task's return until its slot counts as free


class SlotFreedWakeup(bootsteps.StartStopStep):
    """Step of Celery's consumer: an eventfd that finished tasks write to and the loop reads."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        # Never closed: one eventfd serves all connections of the process.
        self._freed = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        signals.task_postrun.connect(self._note, weak=False)

    def register_with_event_loop(self, consumer: Any, hub: Any) -> None:  # noqa: ARG002
        """Add the eventfd to the loop; Celery calls this for each new connection to Redis."""
        hub.add_reader(self._freed, self._wake, hub)

    def _note(self, **_: object) -> None:
        os.eventfd_write(self._freed, 1)

    def _wake(self, hub: Any) -> None:
        os.eventfd_read(self._freed)
        hub.call_later(_FREED_S, _nothing)  # one run of the loop is enough


def _nothing() -> None:
    pass
