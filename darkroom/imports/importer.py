"""A file of rows becomes a batch: all of it in the caller's transaction, a chunk at a time."""

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

MAX_PROBLEMS: Final = 10_000  #: told in one answer; all are counted, and errors.csv has all
# Another import of the same tenant holds its place in the queue until it commits: wait for that,
# and let the reading of a chunk take its time on a busy machine.
_PATIENCE: Final = text(
    "SET LOCAL statement_timeout = '120s'; SET LOCAL idle_in_transaction_session_timeout = '120s'"
)
_CHUNK: Final = 5_000  # jobs of one COPY: the memory it takes, and the idle time between two


@dataclass(frozen=True)
class Limits:
    """How large a batch may be."""

    max_rows: int
    max_jobs: int


@dataclass
class ImportSummary:
    """What was found in a file."""

    rows: int = 0
    rejected: int = 0
    jobs: int = 0
    cost: float = 0.0  #: of the jobs together, see `params.cost`
    problem_count: int = 0
    problems: list[InputProblem] = field(default_factory=list)  #: the first of them

    def refuse(self) -> InvalidInput:
        """The error that tells of them."""
        return InvalidInput(self.problems, total=self.problem_count)


class ValidatedRow(NamedTuple):
    """One row's jobs; or none, and what is wrong with it."""

    record: Record
    drafts: list[NewJob]
    problems: list[InputProblem]


class Chunk(NamedTuple):
    """What goes into the database at once."""

    drafts: list[NewJob]
    rejected: list[bytes]  #: pieces of errors.csv


def check(table: Table, plan: ImportOptions, *, limits: Limits) -> ImportSummary:
    """What would become of the file. Raises InvalidInput when it cannot be read to its end."""
    tally = ImportSummary()
    for _ in _validated(table, plan, limits, tally):
        pass
    return tally


def load(
    session: Session,
    batch: Batch,
    table: Table,
    plan: ImportOptions,
    *,
    on_error: OnError,
    limits: Limits,
) -> ImportSummary:
    """Fill a new batch with the file's jobs, which exist once the caller commits.

    Raises InvalidInput when rows are bad: any of them under `reject`, all of them under `skip`.
    The caller must roll back then, as jobs may already stand in its transaction.
    """
    session.execute(_PATIENCE)
    tally = ImportSummary()
    pieces = 0
    # Read in a thread of its own: while the server takes one chunk in, the next is judged.
    for chunk in prefetch(_chunks(table, plan, limits, tally, on_error)):
        if chunk.drafts:
            lifecycle.submit(session, batch.tenant_id, chunk.drafts, batch_id=batch.id)
        rejected_rows.write(session, batch.id, chunk.rejected, first=pieces)
        pieces += len(chunk.rejected)
        fault_points.fault_point("in-import")
    if not tally.jobs or (tally.rejected and on_error is OnError.REJECT):
        raise tally.refuse()
    batches.fill(session, batch, total=tally.jobs, rejected=tally.rejected)
    return tally


def _chunks(
    table: Table, plan: ImportOptions, limits: Limits, tally: ImportSummary, on_error: OnError
) -> Iterator[Chunk]:
    rejects = RejectedRowWriter(table.header)
    drafts: list[NewJob] = []
    for verdict in _validated(table, plan, limits, tally):
        if verdict.problems and on_error is OnError.SKIP:
            rejects.add(verdict.record, verdict.problems)
        if tally.rejected and on_error is OnError.REJECT:
            continue  # only to tell of every bad row
        drafts += verdict.drafts
        if len(drafts) >= _CHUNK or rejects.pieces:
            yield Chunk(drafts, rejects.taken())
            drafts = []
    if tally.rejected and on_error is OnError.SKIP:
        rejects.close()
    yield Chunk(drafts, rejects.taken())


def _validated(
    table: Table, plan: ImportOptions, limits: Limits, tally: ImportSummary
) -> Iterator[ValidatedRow]:
    judge = RowValidator(plan)
    for record in table.records:
        if record.number > limits.max_rows:
            message = f"the file has more than {limits.max_rows:,} rows; send it in parts"
            raise file_problem("too_many_rows", message)
        tally.rows += 1
        try:
            verdict = ValidatedRow(record, judge(record), [])
        except InvalidInput as invalid:
            verdict = ValidatedRow(record, [], invalid.problems)
            tally.rejected += 1
            tally.problem_count += len(invalid.problems)
            tally.problems += invalid.problems[: MAX_PROBLEMS - len(tally.problems)]
        tally.jobs += len(verdict.drafts)
        tally.cost += sum(draft.template.cost for draft in verdict.drafts)
        if tally.jobs > limits.max_jobs:
            message = f"the rows make more than {limits.max_jobs:,} jobs; send them in parts"
            raise file_problem("too_many_jobs", message)
        yield verdict
    if not tally.rows:
        raise file_problem("no_rows", "the file has no rows of values")
