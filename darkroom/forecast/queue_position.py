"""Queue position: the queued jobs in service order, and how many are ahead of one.

The first thousand jobs of each class (the front) are read one by one. The jobs behind them (the
tail) are summed in buckets of start tags, so that a snapshot of a million jobs is a few thousand
numbers. The sums take a scan, so they are computed rarely; see `darkroom.forecast.snapshot`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import ColumnElement, Select, and_, func, select, text, tuple_, union_all
from sqlalchemy.orm import Session

from darkroom.db.tables import Job
from darkroom.queue.fairness import FADING
from darkroom.status import PRIORITY_RANK, Status

FRONT: Final = 1_000  #: jobs of each class that are read one by one
BUCKETS: Final = 200  #: of start tags, in which the tail is summed
_LAST_ROWS: Final = 200  #: of a batch, among which its last queued job is looked for


@dataclass(frozen=True)
class QueuedJob:
    """Job of the front."""

    priority: int
    start_tag: float
    id: str
    microbatch_key: str
    cost: float


@dataclass(frozen=True)
class TailBucket:
    """Jobs of the tail of one class, of one microbatch key, in one interval of start tags."""

    priority: int
    microbatch_key: str
    first_tag: float
    last_tag: float
    jobs: int
    cost: float


@dataclass(frozen=True)
class Depth:
    """Queued jobs of one class and model."""

    priority: int
    model: str
    jobs: int
    cost: float
    oldest_queued_s: float


@dataclass(frozen=True)
class TenantShare:
    """Share of one tenant in one class: its next start tag, and its rate of submission."""

    tenant_id: str
    priority: int
    next_start_tag: float
    weight: float
    cost_per_s: float  #: submitted, with a decay of ten minutes
    squares_per_s: float  #: of the costs of single submissions; the variance of `cost_per_s`


_IS_QUEUED: Final = and_(Job.status == Status.QUEUED, ~Job.paused)


def queue_front(session: Session) -> list[QueuedJob]:
    """Return the first jobs of each class, in service order."""
    rows = session.execute(union_all(*map(queue_front_of, sorted(PRIORITY_RANK.values()))))
    jobs = [QueuedJob(*row) for row in rows]
    return sorted(jobs, key=lambda job: (job.priority, job.start_tag, job.id))


def queue_front_of(priority: int) -> Select[int, float, str, str, float]:
    """Build the query for the first jobs of one class."""
    columns = (Job.priority, Job.start_tag, Job.id, Job.microbatch_key, Job.cost)
    first = select(*columns).where(_IS_QUEUED, Job.priority == priority)
    return first.order_by(Job.start_tag, Job.id).limit(FRONT).subquery().select()


def queue_tail(session: Session, front: Sequence[QueuedJob]) -> list[TailBucket]:
    """Sum the queued jobs behind `front`, in service order."""
    ends = {job.priority: (job.start_tag, job.id) for job in front}
    sizes = {rank: sum(job.priority == rank for job in front) for rank in ends}
    tail: list[TailBucket] = []
    for rank, end in sorted(ends.items()):
        if sizes[rank] == FRONT:
            tail += _tail_of_class(session, rank, end)
    return tail


def _tail_of_class(session: Session, priority: int, end: tuple[float, str]) -> list[TailBucket]:
    queued = and_(_IS_QUEUED, Job.priority == priority)
    last = (
        select(Job.start_tag).where(queued).order_by(Job.start_tag.desc(), Job.id.desc()).limit(1)
    )
    last_tag = session.scalar(last) or end[0]
    width = (last_tag - end[0]) / BUCKETS or 1.0
    bucket = func.least(BUCKETS - 1, func.floor((Job.start_tag - end[0]) / width))
    behind = tuple_(Job.start_tag, Job.id) > tuple_(end[0], end[1])
    rows = session.execute(
        select(Job.microbatch_key, bucket, func.count(), func.sum(Job.cost))
        .where(queued, behind)
        .group_by(Job.microbatch_key, bucket)
    )
    return sorted(
        (
            TailBucket(priority, key, end[0] + n * width, end[0] + (n + 1) * width, jobs, cost)
            for key, n, jobs, cost in rows
        ),
        key=lambda bucket: bucket.first_tag,
    )


def depths(session: Session) -> list[Depth]:
    """Sum the queued jobs by class and model. Reads every queued job."""
    rows = session.execute(
        select(
            Job.priority,
            Job.model,
            func.count(),
            func.sum(Job.cost),
            func.extract("epoch", func.now() - func.min(Job.created_at)),
        )
        .where(_IS_QUEUED)
        .group_by(Job.priority, Job.model)
        .order_by(Job.priority, Job.model)
    )
    return [Depth(*row[:4], float(row[4])) for row in rows]


def paused_jobs(session: Session) -> int:
    """Count the jobs of paused batches."""
    return session.scalar(select(func.count()).where(Job.status == Status.QUEUED, Job.paused)) or 0


def tenant_shares(session: Session) -> list[TenantShare]:
    """Return the share of every tenant that submits."""
    return [TenantShare(*row) for row in session.execute(_TENANT_SHARES, {"fading": FADING})]


#: The rates are exponentially decayed sums divided by the time they cover. A sum that has counted
#: for less than half of the decay time is divided by that half: a first burst is not a rate.
_TENANT_SHARES: Final = text("""
    SELECT tenant_id, priority, next_start_tag, weight, arrived * fresh / span, squares * fresh /
    span FROM ( SELECT f.tenant_id, f.priority, f.next_start_tag, t.weight, f.arrived,
    f.arrived_squares squares, exp(-least(50, extract(epoch FROM now() - f.counted_at)::float8 /
    :fading)) fresh, :fading * (1 - exp(-least(50, greatest(0.5, extract(epoch FROM now() - (SELECT
    min(counted_since) FROM fair_share))::float8 / :fading)))) span FROM fair_share f JOIN tenant t
    ON t.id = f.tenant_id ) AS shares """)


def position(session: Session, job: Job) -> int | None:
    """Return the position of a job in the whole queue (1 is next), or None behind the front."""
    counts = [session.scalar(query) or 0 for query in ahead_of(job)]
    return None if max(counts) >= FRONT else sum(counts) + 1


def ahead_of(job: Job) -> list[Select[int]]:
    """Build the queries that count the jobs ahead, by class, up to the end of the front."""
    above = [_count_front(Job.priority == rank) for rank in range(job.priority)]
    order = tuple_(Job.start_tag, Job.id) < tuple_(job.start_tag, job.id)
    return [*above, _count_front(Job.priority == job.priority, order)]


def _count_front(*conditions: ColumnElement[bool]) -> Select[int]:
    first = select(Job.id).where(_IS_QUEUED, *conditions).limit(FRONT).subquery()
    return select(func.count()).select_from(first)


def last_of(session: Session, batch_id: str) -> Job | None:
    """Return the queued job of a batch that is generated last, or None.

    Looks among the last rows only: it is there unless rows differ in their class.
    """
    queued = select(Job).where(Job.batch_id == batch_id, Job.status == Status.QUEUED)
    rows = session.scalars(
        queued.order_by(Job.row_number.desc(), Job.image_number.desc()).limit(_LAST_ROWS)
    ).all()
    return max(rows, key=lambda job: (job.priority, job.start_tag, job.id), default=None)
