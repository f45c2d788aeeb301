"""/v1/queue: how much waits, how fast it is drawn."""

from http import HTTPStatus
from typing import Literal, Self

from fastapi import APIRouter
from pydantic import BaseModel

from api.dependencies import TenantId, Uses
from api.errors import Refused, documented
from darkroom.forecast.snapshot import Look
from darkroom.status import Priority

router = APIRouter(prefix="/v1/queue", tags=["queue"])


class DepthView(BaseModel):
    """Jobs that wait, of one class and model."""

    priority: Priority
    model: str
    jobs: int
    oldest_age_s: float


class EtaModelView(BaseModel):
    """What forecasts reckon with, measured from the last 200 microbatches.

    A microbatch takes `microbatch_s` of the installation, and `seconds_per_cost` for each unit of
    its cost: a denoise pass of one picture of 512 x 512 pixels, two a step with guidance. A single
    one takes `spread` (relative, one standard deviation) more or less; the rate itself `drift`.
    """

    model: str
    microbatch_s: float
    seconds_per_cost: float
    spread: float
    drift: float


class QueueStateView(BaseModel):
    """The queue, all tenants together. `as_of_s`: how many seconds ago it was looked at."""

    object: Literal["queue"] = "queue"
    paused: bool
    draining: bool
    waiting: int
    held: int
    microbatches_running: int
    oldest_age_s: float | None
    images_per_s: float
    depth: list[DepthView]
    eta_model: list[EtaModelView]
    as_of_s: float

    @classmethod
    def of(cls, look: Look, age_s: float) -> Self:
        """The look as clients see it."""
        depths = look.scan.depths
        return cls(
            paused=look.orders.paused,
            draining=look.orders.draining,
            waiting=sum(depth.jobs for depth in depths),
            held=look.scan.held,
            microbatches_running=len(look.pace.running) if look.pace else 0,
            oldest_age_s=max((depth.oldest_age_s for depth in depths), default=None),
            images_per_s=look.pace.images_per_s if look.pace else 0.0,
            depth=[
                DepthView(
                    priority=list(Priority)[depth.priority],
                    model=depth.model,
                    jobs=depth.jobs,
                    oldest_age_s=depth.oldest_age_s,
                )
                for depth in depths
            ],
            eta_model=_eta_model(look),
            as_of_s=age_s,
        )


def _eta_model(look: Look) -> list[EtaModelView]:
    if look.pace is None:
        return []
    return [
        EtaModelView(
            model=model,
            microbatch_s=fit.per_microbatch_s,
            seconds_per_cost=fit.per_cost_s,
            spread=fit.spread,
            drift=fit.drift,
        )
        for model, fit in sorted(look.pace.by_model.items())
    ]


@router.get("", responses=documented())
def show_queue(_: TenantId, use: Uses) -> QueueStateView:
    """How much waits by class and model, how old the oldest is, and how fast pictures are drawn.

    A second old at most, the depths two; of a very long queue older, as they are counted in a
    thirtieth of the time. `eta_model` is empty until something has been drawn.
    """
    look = use.outlook.now()
    if look is None:
        detail = "the queue cannot be looked at: is the database up? Try again"
        raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "queue_unknown", detail)
    return QueueStateView.of(look, use.outlook.age_s(look))
