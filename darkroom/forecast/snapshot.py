"""The queue looked at as a whole, at one moment: what waits, at what pace, for how long.

A look costs some milliseconds, whatever waits, except for what stands behind the front of a long
queue. That takes a scan, and so an earlier scan is used again for thirty times as long as it took.
"""

import time
from dataclasses import dataclass
from typing import Final

from sqlalchemy.orm import Session

from darkroom.db.tables import Batch, Job
from darkroom.forecast import queue_position, throughput
from darkroom.forecast.eta import Eta, EtaModel, EtaRequest, Forecast
from darkroom.forecast.queue_position import Depth, TailBucket
from darkroom.forecast.throughput import Throughput
from darkroom.generation.model_registry import ModelRegistry
from darkroom.queue import control
from darkroom.queue.control import ControlState
from darkroom.status import PRIORITY_RANK, Priority

_SCANS_AT_MOST: Final = 1 / 30  #: of the time
_SCAN_EVERY_S: Final = 2.0  #: at most


@dataclass(frozen=True)
class BacklogScan:
    """What only a reading of all that waits can tell."""

    depths: list[Depth]
    behind: list[TailBucket]
    paused_jobs: int  #: jobs of paused batches
    due: float  #: when to scan again, by the monotonic clock


@dataclass(frozen=True)
class QueueSnapshot:
    """The queue at one moment."""

    queue: EtaModel
    pace: Throughput | None
    control: ControlState
    scan: BacklogScan
    taken: float  #: by the monotonic clock

    def ask(self, job: Job) -> Forecast:
        """Where the waiting job stands, and how long it will take; that is unknown while paused."""
        found = self.queue.ask(eta_request(job))
        unknown = self.control.paused or job.paused
        return Forecast(found.position, None, None) if unknown else found

    def of_batch(self, session: Session, batch: Batch, *, waiting: bool) -> Eta | None:
        """When its last job will have ended. `waiting`: whether any of them waits."""
        if batch.finished_at is not None or batch.paused_at is not None:
            return None
        if not waiting:
            return self.queue.in_flight()
        last = queue_position.last_of(session, batch.id)
        return self.queue.in_flight() if last is None else self.ask(last).eta

    def of_more(self, tenant_id: str, priority: Priority, cost: float) -> Eta | None:
        """When all of new jobs that cost so much would have ended, were they submitted now."""
        if self.control.paused or not cost:
            return None
        return self.queue.of_more(tenant_id, PRIORITY_RANK[priority], cost)


def take_snapshot(
    session: Session, registry: ModelRegistry, before: BacklogScan | None = None
) -> QueueSnapshot:
    """The queue now; `before`: an earlier scan, used again while it is not due."""
    taken = time.monotonic()
    front = queue_position.queue_front(session)
    scan = before if before is not None and taken < before.due else _scan(session, front)
    known = throughput.measure(session)
    queue = EtaModel(
        front,
        scan.behind,
        queue_position.tenant_shares(session),
        known,
        seats={model.name: model.max_microbatch for model in registry.models.values()},
    )
    return QueueSnapshot(queue, known, control.read_state(session), scan, taken)


def _scan(session: Session, front: list[queue_position.QueuedJob]) -> BacklogScan:
    began = time.monotonic()
    depths, behind = queue_position.depths(session), queue_position.behind(session, front)
    paused_jobs = queue_position.paused_jobs(session)
    ended = time.monotonic()
    pause_s = max(_SCAN_EVERY_S, (ended - began) / _SCANS_AT_MOST)
    return BacklogScan(depths, behind, paused_jobs, ended + pause_s)


def eta_request(job: Job) -> EtaRequest:
    """The job, as a forecast is asked for it."""
    return EtaRequest(
        job.tenant_id, job.priority, job.start_tag, job.id, job.microbatch_key, job.cost
    )
