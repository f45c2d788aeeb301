"""How fast microbatches are drawn, measured from the dispatches that ended lately.

Dispatches overlap: a worker keeps two in flight so that its replica never waits. So the time of
the clock is parted among those under way, equally, and a dispatch's share of it is what it took
of the installation: one that lasted 8 s beside another took 4. These shares add up to the time
that anything was drawn at all, however many replicas drew, and so they tell how long a queue lasts.
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

RECENT: Final = 200  #: dispatches that a rate is measured from
MINUTE_S: Final = 60.0
_BLOCK: Final = 10  #: dispatches whose mean is compared with the next ones', to see the rate drift
_BUSY: Final = 0.75  #: of the usual company; who had less says little of a busy installation
_FEWEST: Final = 5  #: dispatches in company; with fewer, all that there are have to do
#: Before anything was seen: a microbatch takes 30 % more or less than expected. Counts as much as
#: two dispatches, and so soon for little.
_PRIOR_SPREAD: Final = 0.3
_PRIOR_WEIGHT: Final = 2


@dataclass(frozen=True)
class DispatchSpan:
    """A dispatch in time, in seconds from now: `began` is negative, and `ended` of closed ones."""

    model: str
    size: int  #: jobs
    cost: float
    began: float
    ended: float
    drawn: bool  #: to its end; what was broken off took time, but says nothing of a rate

    @property
    def lasted(self) -> float:
        """Seconds from its claim to its end."""
        return self.ended - self.began


@dataclass(frozen=True)
class ServiceTimeModel:
    """What a model's microbatches take of the installation, in seconds."""

    per_microbatch_s: float
    per_cost_s: float
    relative_stddev: float  #: of one microbatch around that; standard deviation, relative
    rate_drift: float  #: of the rate itself, over some ten microbatches; likewise

    def seconds(self, cost: float) -> float:
        """Expected of a microbatch of this cost."""
        return self.per_microbatch_s + self.per_cost_s * cost


@dataclass(frozen=True)
class Throughput:
    """What is known of the rate."""

    by_model: Mapping[str, ServiceTimeModel]
    overall: ServiceTimeModel
    per_cost_s: float  #: all in all, at the size that microbatches had
    microbatch_s: float  #: of a usual one
    company: float  #: dispatches under way at once, while the installation is busy
    running: Sequence[DispatchSpan]
    images_per_s: float  #: over the last minute

    def of(self, model: str) -> ServiceTimeModel:
        """The model's; of one that has drawn nothing lately, that of all."""
        return self.by_model.get(model, self.overall)

    @property
    def residues_s(self) -> list[float]:
        """Of each dispatch under way, how long it will probably last still."""
        return [self._residue(span) for span in self.running]

    def _residue(self, span: DispatchSpan) -> float:
        fit = self.of(span.model)
        expected = fit.seconds(span.cost) * max(1.0, min(self.company, len(self.running)))
        late = fit.relative_stddev * expected / 2  # overdue: any moment now, but not this one
        return max(expected + span.began, late)

    @property
    def next_seat_s(self) -> float:
        """When a worker will have done with one of them and can claim; 0 where one idles."""
        if len(self.running) < round(self.company):
            return 0.0
        return min(self.residues_s, default=0.0)


def measure(session: Session) -> Throughput | None:
    """The pace now. None when nothing has been drawn yet."""
    age = func.extract("epoch", func.now() - Dispatch.created_at)
    left = func.extract("epoch", func.now() - Dispatch.finished_at)
    columns = (Dispatch.microbatch_key, Dispatch.size, Dispatch.cost, Dispatch.status, age, left)
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
    return throughput_of(spans[: len(spans) - _running(rows)], spans[len(spans) - _running(rows) :])


def _running(rows: Sequence[Sequence[object]]) -> int:
    return sum(row[3] == DispatchStatus.RUNNING for row in rows)


def throughput_of(
    closed: Sequence[DispatchSpan], running: Sequence[DispatchSpan]
) -> Throughput | None:
    """What these dispatches say; None when none of them was drawn to its end."""
    drawn = [
        (span, share)
        for span, share in zip(closed, shares([*closed, *running]), strict=False)
        if span.drawn and share > 0
    ]
    if not drawn:
        return None
    company = _company(drawn)
    busy = [pair for pair in drawn if pair[0].lasted / pair[1] >= _BUSY * company]
    sample = busy if len(busy) >= min(_FEWEST, len(drawn)) else drawn
    models = defaultdict(list)
    for pair in sample:
        models[pair[0].model].append(pair)
    minute = [span.size for span in closed if span.drawn and span.ended > -MINUTE_S]
    return Throughput(
        by_model={model: fit(pairs) for model, pairs in models.items()},
        overall=fit(sample),
        per_cost_s=sum(share for _, share in sample) / sum(span.cost for span, _ in sample),
        microbatch_s=statistics.fmean(share for _, share in sample),
        company=company,
        running=running,
        images_per_s=sum(minute) / MINUTE_S,
    )


def _company(drawn: Sequence[tuple[DispatchSpan, float]]) -> float:
    """How many are under way at once when many are: what nine of ten stay below."""
    had = sorted(span.lasted / share for span, share in drawn)
    return had[int(0.9 * (len(had) - 1))]


def shares(spans: Sequence[DispatchSpan]) -> list[float]:
    """Of each, its part of the time, which those that are under way at once share equally."""
    edges = sorted({edge for span in spans for edge in (span.began, span.ended)})
    place = {edge: number for number, edge in enumerate(edges)}
    arrivals = [0] * (len(edges) + 1)
    for span in spans:
        arrivals[place[span.began]] += 1
        arrivals[place[span.ended]] -= 1
    under_way = list(itertools.accumulate(arrivals))
    spent = [
        (after - before) / max(number, 1)
        for (before, after), number in zip(itertools.pairwise(edges), under_way, strict=False)
    ]
    until = [0.0, *itertools.accumulate(spent)]
    return [until[place[span.ended]] - until[place[span.began]] for span in spans]


def fit(drawn: Sequence[tuple[DispatchSpan, float]]) -> ServiceTimeModel:
    """So much for each microbatch and so much for its cost, by least squares; neither negative."""
    costs = [span.cost for span, _ in drawn]
    took = [share for _, share in drawn]
    per_microbatch, per_cost = 0.0, sum(took) / sum(costs)
    if len(drawn) >= _FEWEST and min(costs) < max(costs):
        slope, intercept = statistics.linear_regression(costs, took)
        if slope <= 0:
            per_microbatch, per_cost = statistics.fmean(took), 0.0
        elif intercept > 0:
            per_microbatch, per_cost = intercept, slope
    misses = [
        share / (per_microbatch + per_cost * span.cost) - 1
        for span, share in sorted(drawn, key=lambda pair: pair[0].began)
    ]
    seen = sum(miss**2 for miss in misses) + _PRIOR_WEIGHT * _PRIOR_SPREAD**2
    spread = math.sqrt(seen / (len(misses) + _PRIOR_WEIGHT))
    return ServiceTimeModel(per_microbatch, per_cost, spread, _drift(misses, spread))


def _drift(misses: Sequence[float], spread: float) -> float:
    """What the means of blocks vary beyond what chance alone would have them vary."""
    blocks = [misses[at : at + _BLOCK] for at in range(0, len(misses) - _BLOCK + 1, _BLOCK)]
    if len(blocks) < 2:  # noqa: PLR2004  # it takes two to vary
        return spread / math.sqrt(max(len(misses), 1))
    varied = statistics.pvariance([statistics.fmean(block) for block in blocks])
    return math.sqrt(max(varied - spread**2 / _BLOCK, spread**2 / len(misses)))
