"""I1 to I9: what must hold after every run. Pure: evidence in, violations out."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from tests.chaos.evidence import Evidence, JobRow
from tests.chaos.replica import color_of

FINISHED = frozenset({"succeeded", "failed", "canceled", "expired"})
_NOT_FOUND = 404
_UNAVAILABLE = 503


@dataclass(frozen=True)
class Violation:
    """One fact that breaks an invariant."""

    invariant: str
    subject: str
    what: str

    def __str__(self) -> str:
        return f"{self.invariant} {self.subject}: {self.what}"


def violations(evidence: Evidence) -> list[Violation]:
    """Return every broken invariant; empty when all hold."""
    checks = (
        every_accepted_job_ended_once,
        nothing_was_counted_twice,
        every_image_is_stored_and_its_own,
        every_finish_has_its_event,
        no_tenant_sees_anothers_jobs,
        errors_are_documented,
        counts_are_those_of_the_rows,
        nothing_is_left_over,
        every_request_was_answered_and_carried_out_once,
    )
    return [violation for check in checks for violation in check(evidence)]


def every_accepted_job_ended_once(evidence: Evidence) -> Iterator[Violation]:
    """I1: each acknowledged job is there, as it was asked for, in one terminal state."""
    singles = {job.id: job for job in evidence.jobs if job.batch_id is None}
    rows = {(job.batch_id, job.row_number): job for job in evidence.jobs if job.batch_id}
    for submission in evidence.submissions:
        if submission.id is None:
            continue
        for number, wanted in enumerate(submission.jobs, start=1):
            key = (submission.id, number)
            job = rows.get(key) if submission.as_batch else singles.get(submission.id)
            subject = f"{submission.id}#{number}" if submission.as_batch else submission.id
            if job is None:
                yield Violation("I1", subject, "was acknowledged and is not there")
            elif (job.prompt, job.seed) != (wanted.prompt, wanted.seed):
                yield Violation("I1", subject, "is not what was asked for")
            elif job.status not in wanted.ends:
                yield Violation("I1", subject, f"is {job.status} ({job.error_code})")
            elif job.ends == 0:
                yield Violation("I1", subject, f"is {job.status}, but no event records its finish")


def nothing_was_counted_twice(evidence: Evidence) -> Iterator[Violation]:
    """I2: one end for a job, one end for a batch, one row for a row."""
    for job in evidence.jobs:
        if job.ends > 1:
            yield Violation("I2", job.id, f"ended {job.ends} times")
    for batch in evidence.batches.values():
        if batch.finished and batch.ends != 1:
            yield Violation("I2", batch.id, f"is finished, and ended {batch.ends} times")
    for job_id, times in Counter(job.id for job in evidence.jobs).items():
        if times > 1:
            yield Violation("I2", job_id, f"is there {times} times")
    places = Counter((job.batch_id, job.row_number) for job in evidence.jobs if job.batch_id)
    for (batch_id, number), times in places.items():
        if times > 1:
            yield Violation("I2", f"{batch_id}#{number}", f"is there {times} times")


def every_image_is_stored_and_its_own(evidence: Evidence) -> Iterator[Violation]:
    """I3: the object is there, its hash is the row's, and it shows what the job asked for."""
    for job in evidence.jobs:
        if job.status != "succeeded":
            continue
        image = evidence.images.get(job.image_key or "")
        if image is None:
            yield Violation("I3", job.id, f"succeeded without an object at {job.image_key}")
        elif image.sha256 != job.image_sha256:
            yield Violation("I3", job.id, "its object has another hash")
        elif image.job_id != job.id:
            yield Violation("I3", job.id, f"its object says that it is {image.job_id}'s")
        elif evidence.colors_known and image.color != color_of(job.prompt, job.seed):
            yield Violation("I3", job.id, "its object shows something else")


def every_finish_has_its_event(evidence: Evidence) -> Iterator[Violation]:
    """I4: each end reached its receiver, all attempts of it under one id. Where one listens."""
    if evidence.deliveries is None:
        return
    for job in evidence.jobs:
        ids = set(evidence.deliveries.get(job.id, ()))
        if job.status in FINISHED and len(ids) != 1:
            yield Violation("I4", job.id, f"its finish was sent under {len(ids)} ids")


def no_tenant_sees_anothers_jobs(evidence: Evidence) -> Iterator[Violation]:
    """I5: another tenant's object is not found, and every row is its owner's."""
    for path, status in evidence.trespasses:
        if status != _NOT_FOUND:
            yield Violation("I5", path, f"another tenant was answered {status}")
    owners = {each.id: evidence.tenants[each.tenant] for each in evidence.submissions}
    for job in evidence.jobs:
        if owners.get(job.batch_id or job.id, job.tenant_id) != job.tenant_id:
            yield Violation("I5", job.id, f"belongs to {job.tenant_id}")


def errors_are_documented(evidence: Evidence) -> Iterator[Violation]:
    """I6: no 5xx but a 503 that says when to come back."""
    for answer in evidence.answers:
        documented = answer.status == _UNAVAILABLE and answer.retry_after is not None
        if answer.status >= 500 and not documented:
            yield Violation("I6", f"HTTP {answer.status}", answer.code or "no problem document")


def counts_are_those_of_the_rows(evidence: Evidence) -> Iterator[Violation]:
    """I7: what the API counts of a batch is what its rows are."""
    by_batch: dict[str, list[JobRow]] = {}
    for job in evidence.jobs:
        if job.batch_id is not None:
            by_batch.setdefault(job.batch_id, []).append(job)
    for batch in evidence.batches.values():
        rows = by_batch.get(batch.id, [])
        actual = Counter(job.status for job in rows) | Counter(total=len(rows))
        counted = Counter({name: count for name, count in batch.counts.items() if count})
        if counted != actual or batch.total != len(rows):
            yield Violation("I7", batch.id, f"counts {dict(counted)}, but has {dict(actual)}")
        if batch.finished != all(job.status in FINISHED for job in rows):
            yield Violation("I7", batch.id, f"finished is {batch.finished}: {dict(actual)}")


def nothing_is_left_over(evidence: Evidence) -> Iterator[Violation]:
    """I8: no orphan, lease, temporary object or connection."""
    for leftover in evidence.leftovers:
        yield Violation("I8", leftover, "is left over")


def every_request_was_answered_and_carried_out_once(evidence: Evidence) -> Iterator[Violation]:
    """I9: each request was answered in the end, and made what it asked for once."""
    known: set[str | None] = set()
    for submission in evidence.submissions:
        known |= submission.ids
        if len(submission.ids) != 1:
            what = f"was answered with {len(submission.ids)} ids"
            yield Violation("I9", f"key {submission.key}", what)
    for job in evidence.jobs:
        if (job.batch_id or job.id) not in known:
            yield Violation("I9", job.id, "no client was told of it")
