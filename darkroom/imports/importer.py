"""Importer: fills a batch from a file of rows, in chunks, in one transaction of the caller."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from sqlalchemy import text
from sqlalchemy.orm import Session

from darkroom import batches, fault_points
from darkroom.db.tables import Batch
from darkroom.errors import InputProblem, InvalidInput
from darkroom.imports import rejected_rows
from darkroom.imports.records import Record, Table, file_problem
from darkroom.imports.rejected_rows import RejectedRowWriter
from darkroom.imports.row_validator import ImportOptions, RowValidator
from darkroom.jobs import lifecycle
from darkroom.jobs.bulk_insert import NewJob
from darkroom.prefetch import prefetch
from darkroom.status import OnError

MAX_PROBLEMS: Final = 10_000  #: returned in one response; all are counted, and errors.csv has all
# Another import of the same tenant locks its row in the fair queue until it commits, and on a busy
# machine reading a chunk takes seconds.
_LONGER_TIMEOUTS: Final = text(
    "SET LOCAL statement_timeout = '120s'; SET LOCAL idle_in_transaction_session_timeout = '120s'"
)
_CHUNK_JOBS: Final = 5_000  # of one COPY: bounds its memory, and the idle time until the next


@dataclass(frozen=True)
class Limits:
    """Maximum size of a batch."""

    max_rows: int
    max_jobs: int


@dataclass
class ImportSummary:
    """Counts of a file, and its first problems."""

    rows: int = 0
    rejected: int = 0
    jobs: int = 0
    cost: float = 0.0  #: of the jobs together, see `params.cost`
    problem_count: int = 0
    problems: list[InputProblem] = field(default_factory=list)  #: the first `MAX_PROBLEMS`

    def to_error(self) -> InvalidInput:
        """Return the error that reports the problems."""
        return InvalidInput(self.problems, total=self.problem_count)


class ValidatedRow(NamedTuple):
    """Row with its jobs, or with its problems and no job."""

    record: Record
    jobs: list[NewJob]
    problems: list[InputProblem]


class Chunk(NamedTuple):
    """Jobs and rejected rows that are written at once."""

    jobs: list[NewJob]
    rejected: list[bytes]  #: chunks of errors.csv


def check(table: Table, options: ImportOptions, *, limits: Limits) -> ImportSummary:
    """Validate a file without creating jobs. Raise InvalidInput if it cannot be read to its end."""
    summary = ImportSummary()
    for _ in _validated(table, options, limits, summary):
        pass
    return summary


def load(
    session: Session,
    batch: Batch,
    table: Table,
    options: ImportOptions,
    *,
    on_error: OnError,
    limits: Limits,
) -> ImportSummary:
    """Fill a new batch with the file's jobs, which exist once the caller commits.

    Raise InvalidInput if rows are invalid: any of them under `reject`, all of them under `skip`.
    The caller must then roll back, because its transaction may already have jobs.
    """
    session.execute(_LONGER_TIMEOUTS)
    summary = ImportSummary()
    chunks_written = 0
    # In a thread: while PostgreSQL stores one chunk, the next is read and validated.
    for chunk in prefetch(_chunks(table, options, limits, summary, on_error)):
        if chunk.jobs:
            lifecycle.submit(session, batch.tenant_id, chunk.jobs, batch_id=batch.id)
        rejected_rows.write(session, batch.id, chunk.rejected, first=chunks_written)
        chunks_written += len(chunk.rejected)
        fault_points.fault_point("in-import")
    if not summary.jobs or (summary.rejected and on_error is OnError.REJECT):
        raise summary.to_error()
    batches.fill(session, batch, total=summary.jobs, rejected=summary.rejected)
    return summary


def _chunks(
    table: Table, options: ImportOptions, limits: Limits, summary: ImportSummary, on_error: OnError
) -> Iterator[Chunk]:
    rejected = RejectedRowWriter(table.header)
    jobs: list[NewJob] = []
    for row in _validated(table, options, limits, summary):
        if row.problems and on_error is OnError.SKIP:
            rejected.add(row.record, row.problems)
        if summary.rejected and on_error is OnError.REJECT:
            continue  # nothing will be created: only count the other invalid rows
        jobs += row.jobs
        if len(jobs) >= _CHUNK_JOBS or rejected.chunks:
            yield Chunk(jobs, rejected.take())
            jobs = []
    if summary.rejected and on_error is OnError.SKIP:
        rejected.close()
    yield Chunk(jobs, rejected.take())


def _validated(
    table: Table, options: ImportOptions, limits: Limits, summary: ImportSummary
) -> Iterator[ValidatedRow]:
    validate = RowValidator(options)
    for record in table.records:
        if record.number > limits.max_rows:
            message = f"the file has more than {limits.max_rows:,} rows; split it"
            raise file_problem("too_many_rows", message)
        summary.rows += 1
        try:
            row = ValidatedRow(record, validate(record), [])
        except InvalidInput as invalid:
            row = ValidatedRow(record, [], invalid.problems)
            summary.rejected += 1
            summary.problem_count += len(invalid.problems)
            summary.problems += invalid.problems[: MAX_PROBLEMS - len(summary.problems)]
        summary.jobs += len(row.jobs)
        summary.cost += sum(job.template.cost for job in row.jobs)
        if summary.jobs > limits.max_jobs:
            message = f"the rows make more than {limits.max_jobs:,} jobs; split the file"
            raise file_problem("too_many_jobs", message)
        yield row
    if not summary.rows:
        raise file_problem("no_rows", "the file has no rows")
