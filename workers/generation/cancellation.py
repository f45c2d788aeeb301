"""Learns which of the jobs that are being drawn nobody wants any more, and says so to who draws."""

import logging
import threading
from typing import Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from darkroom.db.connection import Sessions
from darkroom.queue import dispatches
from workers.generation.heartbeat import LeaseHeartbeat

POLL_S: Final = 0.5  #: one indexed query; how long a canceled job is drawn on at most, and a step

logger = logging.getLogger(__name__)


class CancellationWatcher:
    """A thread that asks the database twice a second while anything is held."""

    def __init__(self, sessions: Sessions, leases: LeaseHeartbeat) -> None:
        self._sessions = sessions
        self._leases = leases
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="withdrawals", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def close(self) -> None:
        """Stop asking."""
        self._closing.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._closing.wait(POLL_S):
            try:
                self._ask()
            except (DBAPIError, PoolTimeout) as error:
                logger.warning("could not ask which jobs were canceled, will again: %s", error)
            except Exception:  # whatever it was: a thread that ends silently is worse
                logger.exception("could not ask which jobs were canceled, will again")

    def _ask(self) -> None:
        held = self._leases.held()
        if not held:
            return
        with self._sessions.begin() as session:
            unwanted = dispatches.canceled_jobs(session, held.keys())
        for dispatch_id, job_ids in unwanted.items():
            held[dispatch_id].withdraw(job_ids)
