"""The queue as a whole: its snapshot, its control state, and what a purge did."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from darkroom.forecast import snapshot
from darkroom.queue import control
from darkroom.status import Priority


class QueueDepth(BaseModel):
    """Queued jobs of one priority and model."""

    priority: Priority
    model: str = Field(description="Name of the model.")
    jobs: int = Field(description="Queued jobs.")
    oldest_queued_s: float = Field(description="Seconds since the oldest of them was submitted.")


class ThroughputEstimate(BaseModel):
    """Measured service time of a model, from the last 200 microbatches.

    ETAs are computed from it: a microbatch takes `seconds_per_microbatch` of the installation, and
    `seconds_per_cost_unit` for each unit of its cost. A unit is a denoise pass over one image of
    512 by 512 pixels; a step with guidance takes two.
    """

    model: str = Field(description="Name of the model.")
    seconds_per_microbatch: float = Field(description="Fixed seconds of a microbatch.")
    seconds_per_cost_unit: float = Field(description="Seconds for each unit of cost.")
    relative_stddev: float = Field(
        description="Standard deviation of one microbatch's time, relative to the estimate."
    )
    rate_drift: float = Field(description="Relative standard deviation of the rate over time.")


class QueueSnapshot(BaseModel):
    """The queue of all tenants at one moment."""

    object: Literal["queue"] = "queue"
    paused: bool = Field(description="Whether workers claim no jobs.")
    draining: bool = Field(description="Whether new jobs are rejected with 503.")
    queued: int = Field(description="Queued jobs, without those of paused batches.")
    paused_jobs: int = Field(description="Queued jobs of paused batches.")
    microbatches_running: int = Field(description="Microbatches in a worker.")
    oldest_queued_s: float | None = Field(
        description="Seconds since the oldest queued job was submitted. Null for an empty queue."
    )
    images_per_s: float = Field(description="Images generated per second, over the last minute.")
    depth: list[QueueDepth] = Field(description="Queued jobs by priority and model.")
    eta_model: list[ThroughputEstimate] = Field(
        description="Measured service times. Empty until something has been generated."
    )
    snapshot_age_s: float = Field(description="Seconds since the snapshot was taken.")

    @classmethod
    def of(cls, taken: snapshot.QueueSnapshot, age_s: float) -> Self:
        """Render a snapshot that is `age_s` seconds old."""
        depths = taken.scan.depths
        return cls(
            paused=taken.control.paused,
            draining=taken.control.draining,
            queued=sum(depth.jobs for depth in depths),
            paused_jobs=taken.scan.paused_jobs,
            microbatches_running=len(taken.throughput.running) if taken.throughput else 0,
            oldest_queued_s=max((depth.oldest_queued_s for depth in depths), default=None),
            images_per_s=taken.throughput.images_per_s if taken.throughput else 0.0,
            depth=[
                QueueDepth(
                    priority=Priority.from_rank(depth.priority),
                    model=depth.model,
                    jobs=depth.jobs,
                    oldest_queued_s=depth.oldest_queued_s,
                )
                for depth in depths
            ],
            eta_model=_throughput(taken),
            snapshot_age_s=age_s,
        )


def _throughput(taken: snapshot.QueueSnapshot) -> list[ThroughputEstimate]:
    if taken.throughput is None:
        return []
    return [
        ThroughputEstimate(
            model=model,
            seconds_per_microbatch=fit.per_microbatch_s,
            seconds_per_cost_unit=fit.per_cost_s,
            relative_stddev=fit.relative_stddev,
            rate_drift=fit.rate_drift,
        )
        for model, fit in sorted(taken.throughput.by_model.items())
    ]


class QueueControl(BaseModel):
    """Control state of the whole installation."""

    object: Literal["queue_control"] = "queue_control"
    paused: bool = Field(description="Whether workers claim no jobs; running jobs are finished.")
    draining: bool = Field(
        description="Whether new jobs are rejected with 503; accepted jobs are generated."
    )

    @classmethod
    def now(cls, session: Session) -> Self:
        """Read the state in this transaction."""
        state = control.read_state(session)
        return cls(paused=state.paused, draining=state.draining)


class PurgeRequest(BaseModel):
    """Body that confirms a purge."""

    model_config = ConfigDict(extra="forbid")

    confirm: Literal["purge"] = Field(description="Must be the string `purge`.")


class PurgeResult(BaseModel):
    """Result of a purge."""

    object: Literal["purge_result"] = "purge_result"
    canceled: int = Field(description="Jobs that the purge canceled.")
