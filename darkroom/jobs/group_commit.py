"""Group commit: single jobs that arrive together share one transaction.

A commit is most of the cost of a submission. One thread commits all jobs that arrived during the
previous commit; on an idle system that is one job, which does not wait.
"""

import asyncio
import itertools
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from sqlalchemy.exc import DBAPIError

from darkroom import fault_points
from darkroom.db.connection import Sessions, is_unavailable
from darkroom.db.tables import Job
from darkroom.errors import Overloaded
from darkroom.jobs import lifecycle, queries
from darkroom.jobs.bulk_insert import NewJob

MAX_GROUP: Final = 500
MAX_PENDING: Final = 5_000


@dataclass(frozen=True)
class PendingSubmission:
    """Job that waits to be committed."""

    tenant_id: str
    new_job: NewJob
    committed: "asyncio.Future[Job]"


_Group: TypeAlias = list[PendingSubmission]


class GroupCommitter:
    """Thread that commits submissions as they arrive."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._pending: queue.SimpleQueue[PendingSubmission | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="group-committer", daemon=True)
        self._thread.start()

    async def submit(self, tenant_id: str, new_job: NewJob) -> Job:
        """Return the job once it is committed. Raises Overloaded when too many are pending.

        If the caller is canceled, the job may be committed all the same.
        """
        if self._pending.qsize() >= MAX_PENDING:
            raise Overloaded(f"{MAX_PENDING:,} jobs are waiting to be committed; try again later")
        committed: asyncio.Future[Job] = asyncio.get_running_loop().create_future()
        self._pending.put(PendingSubmission(tenant_id, new_job, committed))
        return await committed

    @property
    def pending(self) -> int:
        """Number of jobs whose commit has not started."""
        return self._pending.qsize()

    def close(self) -> None:
        """Commit the pending jobs, then stop."""
        self._pending.put(None)
        self._thread.join(timeout=20)

    def _run(self) -> None:
        while (first := self._pending.get()) is not None:
            self._commit([first, *self._next_pending()])

    def _next_pending(self) -> _Group:
        """Return the submissions that have arrived by now."""
        group: _Group = []
        while len(group) < MAX_GROUP - 1:
            try:
                submission = self._pending.get_nowait()
            except queue.Empty:
                break
            if submission is None:
                self._pending.put(None)  # stop after this group
                break
            group.append(submission)
        return group

    def _commit(self, group: _Group) -> None:
        try:
            jobs = self._insert(group)
        except Exception as error:  # noqa: BLE001  # a request waits for each submission
            self._fail(group, error)
            return
        _resolve(group, jobs)

    def _insert(self, group: _Group) -> list[Job]:
        """Commit the group, sorted by tenant so that no two writers deadlock; return its jobs."""
        group.sort(key=_tenant_of)
        job_ids: list[str] = []
        with self._sessions.begin() as session:
            for tenant_id, submissions in itertools.groupby(group, key=_tenant_of):
                new_jobs = [submission.new_job for submission in submissions]
                job_ids += lifecycle.submit(session, tenant_id, new_jobs)
            jobs = queries.find_all(session, job_ids)
            fault_points.fault_point("before-submit-commit")
        fault_points.fault_point("after-submit-commit")
        return jobs

    def _fail(self, group: _Group, error: Exception) -> None:
        """Fail the group, or if the database rejects one of its jobs, commit each one alone."""
        unavailable = isinstance(error, DBAPIError) and is_unavailable(error)
        if len(group) > 1 and isinstance(error, DBAPIError) and not unavailable:
            for submission in group:
                self._commit([submission])
            return
        _resolve(group, [error] * len(group))


def _resolve(group: _Group, results: Sequence[Job | Exception]) -> None:
    """Resolve the group's futures in one call, because waking the event loop is what costs."""

    def resolve_all() -> None:
        for submission, result in zip(group, results, strict=True):
            if submission.committed.done():  # canceled with its request
                continue
            if isinstance(result, Exception):
                submission.committed.set_exception(result)
            else:
                submission.committed.set_result(result)

    group[0].committed.get_loop().call_soon_threadsafe(resolve_all)


def _tenant_of(submission: PendingSubmission) -> str:
    return submission.tenant_id
