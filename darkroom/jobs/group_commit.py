"""Group commit: single jobs that arrive together share one transaction.

A commit is most of what a submission costs. One thread takes whatever has arrived while the last
commit was under way; on an idle system that is one job, and it waits for nobody.
"""

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias

from sqlalchemy.exc import DBAPIError

from darkroom import fault_points
from darkroom.db.connection import Sessions, is_unavailable
from darkroom.db.tables import Job
from darkroom.errors import Overloaded
from darkroom.jobs import lifecycle
from darkroom.jobs.lifecycle import Submission

MAX_GROUP: Final = 500
MAX_PENDING: Final = 5_000


@dataclass(frozen=True)
class PendingSubmission:
    """Job that waits to be committed."""

    tenant_id: str
    submission: Submission
    job: "asyncio.Future[Job]"


_Group: TypeAlias = list[PendingSubmission]


class GroupCommitter:
    """A thread that commits what arrives."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._arrivals: queue.SimpleQueue[PendingSubmission | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)
        self._thread.start()

    async def submit(self, tenant_id: str, submission: Submission) -> Job:
        """The job, once it is committed. Raises Overloaded when too many wait already.

        A caller that goes away takes nothing back: the job may be committed all the same.
        """
        if self._arrivals.qsize() >= MAX_PENDING:
            raise Overloaded(f"{MAX_PENDING:,} jobs wait to be committed; try again")
        arrival = PendingSubmission(
            tenant_id, submission, asyncio.get_running_loop().create_future()
        )
        self._arrivals.put(arrival)
        return await arrival.job

    @property
    def waiting(self) -> int:
        """How many have arrived and are not being committed yet."""
        return self._arrivals.qsize()

    def close(self) -> None:
        """Commit what has arrived, then end."""
        self._arrivals.put(None)
        self._thread.join(timeout=20)

    def _run(self) -> None:
        while (first := self._arrivals.get()) is not None:
            self._commit([first, *self._others()])

    def _others(self) -> _Group:
        """Whoever has arrived by now."""
        group: _Group = []
        while len(group) < MAX_GROUP - 1:
            try:
                arrival = self._arrivals.get_nowait()
            except queue.Empty:
                break
            if arrival is None:
                self._arrivals.put(None)  # the end comes after this group
                break
            group.append(arrival)
        return group

    def _commit(self, group: _Group) -> None:
        try:
            accepted = self._accept(group)
        except Exception as error:  # noqa: BLE001  # whatever it was, somebody waits for an answer
            self._refuse(group, error)
            return
        _resolve(group, [partial(_set_result, job) for job in accepted])

    def _accept(self, group: _Group) -> list[Job]:
        """The jobs, committed, in the group's order: by tenant, so that no two writers deadlock."""
        group.sort(key=_tenant_of)
        accepted: list[Job] = []
        with self._sessions.begin() as session:
            for tenant_id, theirs in itertools.groupby(group, key=_tenant_of):
                submissions = [arrival.submission for arrival in theirs]
                accepted += lifecycle.accept(session, tenant_id, submissions)
            fault_points.fault_point("before-submit-commit")
        fault_points.fault_point("after-submit-commit")
        return accepted

    def _refuse(self, group: _Group, error: Exception) -> None:
        """Nothing was committed. One that the database refuses must not fail its company."""
        out_of_reach = isinstance(error, DBAPIError) and is_unavailable(error)
        if len(group) > 1 and isinstance(error, DBAPIError) and not out_of_reach:
            for arrival in group:
                self._commit([arrival])
            return
        _resolve(group, [partial(_set_error, error)] * len(group))


_Resolution: TypeAlias = "Callable[[asyncio.Future[Job]], None]"


def _resolve(group: _Group, answers: list[_Resolution]) -> None:
    """From the thread to the event loop, in one call: to wake it is what costs."""

    def tell() -> None:
        for arrival, answer in zip(group, answers, strict=True):
            if not arrival.job.done():  # its caller may have gone away
                answer(arrival.job)

    group[0].job.get_loop().call_soon_threadsafe(tell)


def _set_result(job: Job, waiting: "asyncio.Future[Job]") -> None:
    waiting.set_result(job)


def _set_error(error: Exception, waiting: "asyncio.Future[Job]") -> None:
    waiting.set_exception(error)


def _tenant_of(arrival: PendingSubmission) -> str:
    return arrival.tenant_id
