"""Queue snapshot: the whole queue at one moment, its throughput and its ETAs.

A snapshot costs some milliseconds at any length of the queue, except for the tail of a long queue.
The tail takes a scan; an earlier scan is used again for thirty times as long as it took.
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

_MAX_SCAN_SHARE: Final = 1 / 30  #: of the time
_MIN_SCAN_INTERVAL_S: Final = 2.0


@dataclass(frozen=True)
class BacklogScan:
    """Results of reading every queued job."""

    depths: list[Depth]
    tail: list[TailBucket]
    paused_jobs: int  #: jobs of paused batches
    next_scan_at: float  #: by the monotonic clock


@dataclass(frozen=True)
class QueueSnapshot:
    """Queue at one moment."""

    eta_model: EtaModel
    throughput: Throughput | None
    control: ControlState
    scan: BacklogScan
    taken_at: float  #: by the monotonic clock

    def ask(self, job: Job) -> Forecast:
        """Return the position and ETA of a queued job; the ETA is unknown while it is paused."""
        forecast = self.eta_model.ask(eta_request(job))
        unknown = self.control.paused or job.paused
        return Forecast(forecast.position, None, None) if unknown else forecast

    def of_batch(self, session: Session, batch: Batch, *, waiting: bool) -> Eta | None:
        """Return the ETA of a batch's last job. `waiting`: whether any of its jobs is queued."""
        if batch.finished_at is not None or batch.paused_at is not None:
            return None
        if not waiting:
            return self.eta_model.in_flight()
        last = queue_position.last_of(session, batch.id)
        return self.eta_model.in_flight() if last is None else self.ask(last).eta

    def of_more(self, tenant_id: str, priority: Priority, cost: float) -> Eta | None:
        """Return the ETA of the last of new jobs of this total cost, submitted now."""
        if self.control.paused or not cost:
            return None
        return self.eta_model.of_more(tenant_id, PRIORITY_RANK[priority], cost)


def take_snapshot(
    session: Session, registry: ModelRegistry, previous: BacklogScan | None = None
) -> QueueSnapshot:
    """Take a snapshot. `previous`: an earlier scan, used again until its `next_scan_at`."""
    taken_at = time.monotonic()
    front = queue_position.queue_front(session)
    if previous is not None and taken_at < previous.next_scan_at:
        scan = previous
    else:
        scan = _scan(session, front)
    measured = throughput.measure(session)
    eta_model = EtaModel(
        front,
        scan.tail,
        queue_position.tenant_shares(session),
        measured,
        max_microbatch={model.name: model.max_microbatch for model in registry.models.values()},
    )
    return QueueSnapshot(eta_model, measured, control.read_state(session), scan, taken_at)


def _scan(session: Session, front: list[queue_position.QueuedJob]) -> BacklogScan:
    started_at = time.monotonic()
    depths, tail = queue_position.depths(session), queue_position.queue_tail(session, front)
    paused_jobs = queue_position.paused_jobs(session)
    ended_at = time.monotonic()
    pause_s = max(_MIN_SCAN_INTERVAL_S, (ended_at - started_at) / _MAX_SCAN_SHARE)
    return BacklogScan(depths, tail, paused_jobs, ended_at + pause_s)


def eta_request(job: Job) -> EtaRequest:
    """Return the fields of a job that its forecast needs."""
    return EtaRequest(
        job.tenant_id, job.priority, job.start_tag, job.id, job.microbatch_key, job.cost
    )
