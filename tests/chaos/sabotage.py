"""`python -m tests.chaos.sabotage`: a worker of these tests without the guard that CHAOS_WITHOUT
names.

What the suite must find: it is the negative control of its checks. Nothing of this is a switch of
the product; a running module's functions are replaced before the worker starts.
"""

import os
import threading
import time
from dataclasses import asdict

from sqlalchemy import event, select, update
from sqlalchemy.orm import Session

from darkroom import batches
from darkroom.db.tables import Dispatch, Job
from darkroom.queue import dispatches
from darkroom.queue.outcomes import Succeeded
from darkroom.storage.images import S3Store
from tests.chaos import worker
from workers.generation.heartbeat import LeaseHeartbeat
from workers.generation.in_flight import InFlightDispatch
from workers.maintenance.reaper import Reaper

LATE_S = 1.0  #: how long after its commit something is done that belongs before it


def without_fence():
    """A late worker notices nothing, and whatever it brings is written."""

    def close(session, dispatch_id, status):
        values = {"status": status, "finished_at": dispatches.func.now()}
        session.execute(update(Dispatch).where(Dispatch.id == dispatch_id).values(values))
        return True

    def whatever(outcome):
        if not isinstance(outcome, Succeeded):
            return dispatches._values(outcome)
        image = {name: value for name, value in asdict(outcome).items() if name != "job_id"}
        return image | {"status": "succeeded", "finished_at": dispatches.func.now()}

    def move(session, dispatch_id, outcomes_of, *_):
        held = select(Job).where(Job.dispatch_id == dispatch_id, Job.status == "running")
        moved = []
        for outcome in outcomes_of(session.scalars(held).all()):
            these = update(Job).where(Job.id == outcome.job_id)
            moved += session.scalars(these.values(whatever(outcome)).returning(Job))
        batches.record_finished(session, moved)
        return len(moved)

    dispatches._close_dispatch = close
    dispatches._move = move
    InFlightDispatch.stop = lambda _: None


def without_heartbeat():
    """It believes that it renews."""

    def renew(self):
        self._renewed_at = time.monotonic()

    LeaseHeartbeat._renew = renew


def without_outbox():
    """Write events only after the commit that made them true."""

    def record_later(session, moved):
        bind, ids = session.get_bind(), [job.id for job in moved]

        def write():
            with Session(bind) as later, later.begin():
                batches.record_finished(
                    later, later.scalars(select(Job).where(Job.id.in_(ids))).all()
                )

        def after_commit(_):
            threading.Timer(LATE_S, write).start()

        event.listen(session, "after_commit", after_commit, once=True)

    dispatches.record_finished = record_later


def without_reconciler():
    """Run without the reaper's wake-up for queued jobs."""
    Reaper.reap = lambda _: None


def without_upload_first():
    """Store the image after its job has succeeded."""
    put = S3Store.put

    def put_later(self, *what):
        threading.Timer(LATE_S, put, [self, *what]).start()

    S3Store.put = put_later


REMOVED = {
    "fence": without_fence,
    "heartbeat": without_heartbeat,
    "outbox": without_outbox,
    "reconciler": without_reconciler,
    "upload-first": without_upload_first,
}


if __name__ == "__main__":
    REMOVED[os.environ["CHAOS_WITHOUT"]]()
    worker.main()
