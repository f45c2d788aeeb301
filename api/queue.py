"""/v1/queue: how much waits, how fast it is drawn."""

from http import HTTPStatus
from typing import Literal, Self

from fastapi import APIRouter
from pydantic import BaseModel

from api.dependencies import Deps, TenantId
from api.errors import ProblemException, documented
from darkroom.forecast.snapshot import QueueSnapshot
from darkroom.status import Priority

router = APIRouter(prefix="/v1/queue", tags=["queue"])


class QueueDepth(BaseModel):
    """Jobs that wait, of one class and model."""

    priority: Priority
    model: str
    jobs: int
    oldest_queued_s: float


class ThroughputEstimate(BaseModel):
    """What forecasts reckon with, measured from the last 200 microbatches.

    A microbatch takes `seconds_per_microbatch` of the installation, and `seconds_per_cost_unit` for
    each unit of its cost: a denoise pass of one picture of 512 x 512 pixels, two a step with
    guidance. A single one takes `relative_stddev` (relative, one standard deviation) more or less;
    the rate itself `rate_drift`.
    """

    model: str
    seconds_per_microbatch: float
    seconds_per_cost_unit: float
    relative_stddev: float
    rate_drift: float


class QueueSnapshotView(BaseModel):
    """The queue, all tenants together. `snapshot_age_s`: how many seconds ago it was looked at."""

    object: Literal["queue"] = "queue"
    paused: bool
    draining: bool
    queued: int
    paused_jobs: int
    microbatches_running: int
    oldest_queued_s: float | None
    images_per_s: float
    depth: list[QueueDepth]
    eta_model: list[ThroughputEstimate]
    snapshot_age_s: float

    @classmethod
    def of(cls, look: QueueSnapshot, age_s: float) -> Self:
        """The look as clients see it."""
        depths = look.scan.depths
        return cls(
            paused=look.control.paused,
            draining=look.control.draining,
            queued=sum(depth.jobs for depth in depths),
            paused_jobs=look.scan.paused_jobs,
            microbatches_running=len(look.pace.running) if look.pace else 0,
            oldest_queued_s=max((depth.oldest_queued_s for depth in depths), default=None),
            images_per_s=look.pace.images_per_s if look.pace else 0.0,
            depth=[
                QueueDepth(
                    priority=Priority.from_rank(depth.priority),
                    model=depth.model,
                    jobs=depth.jobs,
                    oldest_queued_s=depth.oldest_queued_s,
                )
                for depth in depths
            ],
            eta_model=_eta_model(look),
            snapshot_age_s=age_s,
        )


def _eta_model(look: QueueSnapshot) -> list[ThroughputEstimate]:
    if look.pace is None:
        return []
    return [
        ThroughputEstimate(
            model=model,
            seconds_per_microbatch=fit.per_microbatch_s,
            seconds_per_cost_unit=fit.per_cost_s,
            relative_stddev=fit.relative_stddev,
            rate_drift=fit.rate_drift,
        )
        for model, fit in sorted(look.pace.by_model.items())
    ]


@router.get("", responses=documented())
def show_queue(_: TenantId, deps: Deps) -> QueueSnapshotView:
    """How much waits by class and model, how old the oldest is, and how fast pictures are drawn.

    A second old at most, the depths two; of a very long queue older, as they are counted in a
    thirtieth of the time. `eta_model` is empty until something has been drawn.
    """
    look = deps.snapshot_cache.now()
    if look is None:
        detail = "the queue cannot be looked at: is the database up? Try again"
        raise ProblemException(HTTPStatus.SERVICE_UNAVAILABLE, "queue_unavailable", detail)
    return QueueSnapshotView.of(look, deps.snapshot_cache.age_s(look))
