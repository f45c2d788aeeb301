"""Throughput: how fast microbatches are generated, measured from recently finished dispatches.

Dispatches overlap: a worker keeps two in flight so that its replica never waits. So wall-clock time
is shared equally among the dispatches in flight, and a dispatch's share is its service time: one
that lasted 8 s beside another took 4. The shares add up to the busy time of the installation,
whatever its number of replicas, and so they tell how long a queue lasts.
"""

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from darkroom.db.tables import Dispatch
from darkroom.generation.params import model_of
from darkroom.status import DispatchStatus

RECENT: Final = 200  #: dispatches from which the rate is measured
MINUTE_S: Final = 60.0
_BLOCK: Final = (
    10  #: dispatches whose mean is compared with that of the next block, to measure the drift
)
_BUSY: Final = 0.75  #: of the usual concurrency; below, a dispatch says little of a busy time
_MIN_SAMPLE: Final = 5  #: busy dispatches; with fewer, all dispatches are used
#: Prior: a microbatch takes 30 % more or less than expected. Weighs as much as two dispatches, so
#: that measurements soon outweigh it.
_PRIOR_STDDEV: Final = 0.3
_PRIOR_WEIGHT: Final = 2


@dataclass(frozen=True)
class DispatchSpan:
    """Dispatch in time, in seconds from now: `began` is negative, and so is a past `ended`."""

    model: str
    size: int  #: jobs
    cost: float
    began: float
    ended: float
    completed: bool  #: if not, it took time but says nothing of the rate

    @property
    def duration_s(self) -> float:
        """Seconds from claim to end."""
        return self.ended - self.began


@dataclass(frozen=True)
class ServiceTimeModel:
    """Service time of a model's microbatches, in seconds: linear in their cost."""

    per_microbatch_s: float
    per_cost_s: float
    relative_stddev: float  #: of one microbatch: standard deviation divided by the mean
    rate_drift: float  #: of the mean of some ten microbatches, likewise

    def seconds(self, cost: float) -> float:
        """Return the expected service time of a microbatch of this cost."""
        return self.per_microbatch_s + self.per_cost_s * cost


@dataclass(frozen=True)
class Throughput:
    """Measured rate of generation."""

    by_model: Mapping[str, ServiceTimeModel]
    overall: ServiceTimeModel
    per_cost_s: float  #: over all models, at the sizes that microbatches had
    microbatch_s: float  #: mean
    concurrency: float  #: dispatches in flight at once while the installation is busy
    running: Sequence[DispatchSpan]
    images_per_s: float  #: over the last minute

    def of(self, model: str) -> ServiceTimeModel:
        """Return a model's service times, or those of all models if it has none yet."""
        return self.by_model.get(model, self.overall)

    @property
    def remaining_s(self) -> list[float]:
        """Expected remaining time of each running dispatch."""
        return [self._remaining(span) for span in self.running]

    def _remaining(self, span: DispatchSpan) -> float:
        model = self.of(span.model)
        expected = model.seconds(span.cost) * max(1.0, min(self.concurrency, len(self.running)))
        minimum = model.relative_stddev * expected / 2  # of an overdue one: soon, but not zero
        return max(expected + span.began, minimum)

    @property
    def next_slot_s(self) -> float:
        """Expected time until a worker can claim again; 0 if a slot is free."""
        if len(self.running) < round(self.concurrency):
            return 0.0
        return min(self.remaining_s, default=0.0)


def measure(session: Session) -> Throughput | None:
    """Measure the throughput. Return None if nothing has been generated yet."""
    age = func.extract("epoch", func.now() - Dispatch.created_at)
    ago = func.extract("epoch", func.now() - Dispatch.finished_at)
    columns = (Dispatch.microbatch_key, Dispatch.size, Dispatch.cost, Dispatch.status, age, ago)
    closed = select(*columns).where(Dispatch.status != DispatchStatus.RUNNING)
    running = select(*columns).where(Dispatch.status == DispatchStatus.RUNNING)
    rows = [
        *session.execute(closed.order_by(Dispatch.id.desc()).limit(RECENT)),
        *session.execute(running),
    ]
    spans = [
        DispatchSpan(
            model_of(key),
            size,
            cost,
            -float(began),
            0.0 if ended is None else -float(ended),
            status == DispatchStatus.FINISHED,
        )
        for key, size, cost, status, began, ended in rows
    ]
    number = sum(row.status != DispatchStatus.RUNNING for row in rows)
    return throughput_of(spans[:number], spans[number:])


def throughput_of(
    closed: Sequence[DispatchSpan], running: Sequence[DispatchSpan]
) -> Throughput | None:
    """Compute the throughput of dispatches. Return None if none of them completed."""
    completed = [
        (span, share)
        for span, share in zip(closed, shares([*closed, *running]), strict=False)
        if span.completed and share > 0
    ]
    if not completed:
        return None
    concurrency = _concurrency(completed)
    busy = [pair for pair in completed if pair[0].duration_s / pair[1] >= _BUSY * concurrency]
    sample = busy if len(busy) >= min(_MIN_SAMPLE, len(completed)) else completed
    models = defaultdict(list)
    for pair in sample:
        models[pair[0].model].append(pair)
    last_minute = [span.size for span in closed if span.completed and span.ended > -MINUTE_S]
    return Throughput(
        by_model={model: fit_service_times(pairs) for model, pairs in models.items()},
        overall=fit_service_times(sample),
        per_cost_s=sum(share for _, share in sample) / sum(span.cost for span, _ in sample),
        microbatch_s=statistics.fmean(share for _, share in sample),
        concurrency=concurrency,
        running=running,
        images_per_s=sum(last_minute) / MINUTE_S,
    )


def _concurrency(completed: Sequence[tuple[DispatchSpan, float]]) -> float:
    """Return the 90 % quantile of the dispatches in flight at once."""
    seen = sorted(span.duration_s / share for span, share in completed)
    return seen[int(0.9 * (len(seen) - 1))]


def shares(spans: Sequence[DispatchSpan]) -> list[float]:
    """Return each dispatch's part of the time, by processor sharing among those in flight."""
    edges = sorted({edge for span in spans for edge in (span.began, span.ended)})
    index = {edge: number for number, edge in enumerate(edges)}
    arrivals = [0] * (len(edges) + 1)
    for span in spans:
        arrivals[index[span.began]] += 1
        arrivals[index[span.ended]] -= 1
    in_flight = list(itertools.accumulate(arrivals))
    spent = [
        (after - before) / max(number, 1)
        for (before, after), number in zip(itertools.pairwise(edges), in_flight, strict=False)
    ]
    cumulated = [0.0, *itertools.accumulate(spent)]
    return [cumulated[index[span.ended]] - cumulated[index[span.began]] for span in spans]


def fit_service_times(sample: Sequence[tuple[DispatchSpan, float]]) -> ServiceTimeModel:
    """Fit service time = per_microbatch + per_cost x cost by least squares; neither is negative."""
    costs = [span.cost for span, _ in sample]
    times = [share for _, share in sample]
    per_microbatch, per_cost = 0.0, sum(times) / sum(costs)
    if len(sample) >= _MIN_SAMPLE and min(costs) < max(costs):
        slope, intercept = statistics.linear_regression(costs, times)
        if slope <= 0:
            per_microbatch, per_cost = statistics.fmean(times), 0.0
        elif intercept > 0:
            per_microbatch, per_cost = intercept, slope
    residuals = [
        share / (per_microbatch + per_cost * span.cost) - 1
        for span, share in sorted(sample, key=lambda pair: pair[0].began)
    ]
    squares = sum(residual**2 for residual in residuals) + _PRIOR_WEIGHT * _PRIOR_STDDEV**2
    stddev = math.sqrt(squares / (len(residuals) + _PRIOR_WEIGHT))
    return ServiceTimeModel(per_microbatch, per_cost, stddev, _drift(residuals, stddev))


def _drift(residuals: Sequence[float], stddev: float) -> float:
    """Return the standard deviation of block means beyond that of independent residuals."""
    blocks = [residuals[at : at + _BLOCK] for at in range(0, len(residuals) - _BLOCK + 1, _BLOCK)]
    if len(blocks) < 2:  # noqa: PLR2004  # one block has no variance
        return stddev / math.sqrt(max(len(residuals), 1))
    variance = statistics.pvariance([statistics.fmean(block) for block in blocks])
    return math.sqrt(max(variance - stddev**2 / _BLOCK, stddev**2 / len(residuals)))
