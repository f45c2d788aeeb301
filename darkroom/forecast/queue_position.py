"""What waits, in the order in which it will be drawn: who is ahead of whom, by how much.

The first thousand of each class are known one by one. Of what stands behind them only sums are
kept, in steps of the fair tags: a look at a queue of a million is then a look at a few thousand
numbers. Such sums take a scan, and so they are taken seldom; see `api.snapshot_cache`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import ColumnElement, Select, and_, func, select, text, tuple_, union_all
from sqlalchemy.orm import Session

from darkroom.db.tables import Job
from darkroom.queue.fairness import FADING
from darkroom.status import PRIORITY_RANK, Status

FRONT: Final = 1_000  #: jobs of each class that are known one by one
STEPS: Final = 200  #: in which the tags behind the front are summed
_LAST_ROWS: Final = 200  #: of a batch, among which its last waiting job is looked for


@dataclass(frozen=True)
class QueuedJob:
    """A job of the front."""

    priority: int
    start_tag: float
    id: str
    microbatch_key: str
    cost: float


@dataclass(frozen=True)
class TailBucket:
    """Jobs behind the front of their class: of one key, with tags of one step."""

    priority: int
    microbatch_key: str
    first_tag: float
    last_tag: float
    jobs: int
    cost: float


@dataclass(frozen=True)
class Depth:
    """Jobs that wait, of one class and model."""

    priority: int
    model: str
    jobs: int
    cost: float
    oldest_queued_s: float


@dataclass(frozen=True)
class TenantShare:
    """A tenant's share of one class: how far its tags reach, and what it submits."""

    tenant_id: str
    priority: int
    next_start_tag: float
    weight: float
    cost_per_s: float  #: submitted, over some ten minutes
    squares_per_s: float  #: of what came at once; the variance of the above


_WAITS: Final = and_(Job.status == Status.QUEUED, ~Job.paused)


def queue_front(session: Session) -> list[QueuedJob]:
    """The first jobs of each class, in the order of the queue."""
    rows = session.execute(union_all(*map(queue_front_of, sorted(PRIORITY_RANK.values()))))
    found = [QueuedJob(*row) for row in rows]
    return sorted(found, key=lambda job: (job.priority, job.start_tag, job.id))


def queue_front_of(priority: int) -> Select[int, float, str, str, float]:
    """The statement for the first jobs of one class."""
    columns = (Job.priority, Job.start_tag, Job.id, Job.microbatch_key, Job.cost)
    first = select(*columns).where(_WAITS, Job.priority == priority)
    return first.order_by(Job.start_tag, Job.id).limit(FRONT).subquery().select()


def behind(session: Session, known: Sequence[QueuedJob]) -> list[TailBucket]:
    """What stands behind these, which are the front; in the order of the queue."""
    ends = {job.priority: (job.start_tag, job.id) for job in known}
    sizes = {rank: sum(job.priority == rank for job in known) for rank in ends}
    sums: list[TailBucket] = []
    for rank, end in sorted(ends.items()):
        if sizes[rank] == FRONT:
            sums += _summed(session, rank, end)
    return sums


def _summed(session: Session, priority: int, end: tuple[float, str]) -> list[TailBucket]:
    theirs = and_(_WAITS, Job.priority == priority)
    last = (
        select(Job.start_tag).where(theirs).order_by(Job.start_tag.desc(), Job.id.desc()).limit(1)
    )
    last_tag = session.scalar(last) or end[0]
    width = (last_tag - end[0]) / STEPS or 1.0
    step = func.least(STEPS - 1, func.floor((Job.start_tag - end[0]) / width))
    past = tuple_(Job.start_tag, Job.id) > tuple_(end[0], end[1])
    rows = session.execute(
        select(Job.microbatch_key, step, func.count(), func.sum(Job.cost))
        .where(theirs, past)
        .group_by(Job.microbatch_key, step)
    )
    return sorted(
        (
            TailBucket(priority, key, end[0] + at * width, end[0] + (at + 1) * width, jobs, cost)
            for key, at, jobs, cost in rows
        ),
        key=lambda each: each.first_tag,
    )


def depths(session: Session) -> list[Depth]:
    """How much waits, by class and model. Reads every job that waits."""
    rows = session.execute(
        select(
            Job.priority,
            Job.model,
            func.count(),
            func.sum(Job.cost),
            func.extract("epoch", func.now() - func.min(Job.created_at)),
        )
        .where(_WAITS)
        .group_by(Job.priority, Job.model)
        .order_by(Job.priority, Job.model)
    )
    return [Depth(*row[:4], float(row[4])) for row in rows]


def paused_jobs(session: Session) -> int:
    """Jobs of paused batches."""
    return session.scalar(select(func.count()).where(Job.status == Status.QUEUED, Job.paused)) or 0


def tenant_shares(session: Session) -> list[TenantShare]:
    """Who submits, how much, and how far ahead its tags are."""
    return [TenantShare(*row) for row in session.execute(_TENANT_SHARES, {"fading": FADING})]


#: The rates are of sums that fade. Where nothing was counted for long yet, not even half of that
#: time, they are taken as if it had been half: a first burst is not a habit.
_TENANT_SHARES: Final = text("""
    SELECT tenant_id, priority, next_start_tag, weight, arrived * fresh / span, squares * fresh /
    span FROM ( SELECT f.tenant_id, f.priority, f.next_start_tag, t.weight, f.arrived,
    f.arrived_squares squares, exp(-least(50, extract(epoch FROM now() - f.counted_at)::float8 /
    :fading)) fresh, :fading * (1 - exp(-least(50, greatest(0.5, extract(epoch FROM now() - (SELECT
    min(counted_since) FROM fair_share))::float8 / :fading)))) span FROM fair_share f JOIN tenant t
    ON t.id = f.tenant_id ) AS shares """)


def position(session: Session, job: Job) -> int | None:
    """The job's place in its whole queue, 1 is next; None past the front, see `Queue.place`."""
    counts = [session.scalar(each) or 0 for each in ahead_of(job)]
    return None if max(counts) >= FRONT else sum(counts) + 1


def ahead_of(job: Job) -> list[Select[int]]:
    """The statements that count who is ahead of the job, up to the front's end, by class."""
    above = [_few(Job.priority == rank) for rank in range(job.priority)]
    order = tuple_(Job.start_tag, Job.id) < tuple_(job.start_tag, job.id)
    return [*above, _few(Job.priority == job.priority, order)]


def _few(*which: ColumnElement[bool]) -> Select[int]:
    first = select(Job.id).where(_WAITS, *which).limit(FRONT).subquery()
    return select(func.count()).select_from(first)


def last_of(session: Session, batch_id: str) -> Job | None:
    """The waiting job of the batch that will be drawn last; None when none waits.

    Looked for among the last rows, which is where it is unless rows differ in their class.
    """
    ended = select(Job).where(Job.batch_id == batch_id, Job.status == Status.QUEUED)
    rows = session.scalars(
        ended.order_by(Job.row_number.desc(), Job.image_number.desc()).limit(_LAST_ROWS)
    ).all()
    return max(rows, key=lambda job: (job.priority, job.start_tag, job.id), default=None)
