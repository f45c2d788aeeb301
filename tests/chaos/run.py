"""One row of the fault matrix: load, injections, healing, checks, a line of the table."""

import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

from tests.chaos import evidence
from tests.chaos.checks import FINISHED, Violation, violations
from tests.chaos.client import ExpectedImage, RecordingClient, RequestLoad, SentRequest, plan
from tests.chaos.system import SystemUnderTest
from tests.support.servers import ServerProcess
from tests.support.webhook_receiver import Receiver

QUIET_WITHIN_S = 180


@dataclass(frozen=True)
class FaultResult:
    """A line of the table."""

    row: str
    fault: str
    injections: int
    jobs: int
    lost: int
    duplicated: int
    late_tried: int
    late_refused: int
    recoveries: Sequence[float]
    seconds: float
    violations: Sequence[Violation]
    notes: Sequence[str] = ()
    skipped: str = ""  #: why it could not run here
    #: of a control, from which a guard was removed: what must be found
    must_find: frozenset[str] = frozenset()

    @property
    def found(self) -> frozenset[str]:
        return frozenset(violation.invariant for violation in self.violations)


@dataclass
class FaultRun:
    """What a row works with. Times are the monotonic clock's."""

    row: str
    fault: str
    system: SystemUnderTest
    rng: random.Random
    injections: int = 0
    late_tried: int = 0
    late_refused: int = 0
    recoveries: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missed: list[Violation] = field(default_factory=list)  #: the row's own criteria
    receiver: Receiver | None = None  #: of webhooks, where the row receives webhooks
    quiet_within_s: float = QUIET_WITHIN_S

    def __post_init__(self) -> None:
        self.label = f"{self.row}-{uuid.uuid4().hex[:12]}"
        self.began = time.monotonic()
        log = self.system.folder / f"{self.label}.jsonl"
        self.client = RecordingClient(self.system.url, self.system.keys, self.label, log)

    def load(self, jobs: int, **how: object) -> RequestLoad:
        """So many jobs, asked for in the background."""
        return RequestLoad(self.client, plan(self.rng, jobs, **how))

    def submit(self, *wanted: ExpectedImage, tenant: int = 0) -> str:
        """One job, or a batch of several; its id."""
        submission = SentRequest(tenant, wanted, as_batch=len(wanted) > 1)
        submitted = self.client.submit(submission)
        assert submitted is not None, f"{self.row}: no response"
        return submitted

    def probe(self) -> None:
        """Return how long an urgent job takes now: the system has recovered once it succeeds."""
        began = time.monotonic()
        urgent = ExpectedImage(
            "a probe", self.rng.randrange(2**32), fields=(("priority", "interactive"),)
        )
        job_id = self.submit(urgent)
        if self.system.wait_until(lambda: self.status(job_id) in FINISHED, within_s=90):
            self.recoveries.append(time.monotonic() - began)

    def require(self, what: str, *, holds: bool) -> None:
        """A criterion of this row's own; what holds is noted, what does not makes it red."""
        if holds:
            self.notes.append(what)
        else:
            self.missed.append(Violation("criterion", self.row, what))

    def status(self, job_id: str) -> object:
        return self.system.value("SELECT status FROM job WHERE id = :id", id=job_id)

    def unfinished(self) -> int:
        statement = "SELECT count(*) FROM job WHERE label = :label AND finished_at IS NULL"
        return int(str(self.system.value(statement, label=self.label)))

    def wait_for_backlog(self, jobs: int = 1) -> None:
        """Until so many wait or run: a fault in an idle system shows nothing."""
        assert self.system.wait_until(lambda: self.unfinished() >= jobs)

    def wait_for_running(self, workers: Sequence[ServerProcess] = ()) -> None:
        """Until each of these, or anybody, holds an open dispatch."""
        for server in workers or (None,):
            assert self.system.wait_until(lambda server=server: self.held_by(server) != [])

    def held_by(self, server: ServerProcess | None = None) -> list[int]:
        """The open dispatches of a worker, or of all."""
        worker = "%" if server is None else f"%:{server.running.process.pid}:%"
        statement = "SELECT id FROM dispatch WHERE status = 'running' AND worker_id LIKE :worker"
        return [row.id for row in self.system.rows(statement, worker=worker)]

    def jobs_of(self, server: ServerProcess) -> list[str]:
        """What a worker that has just died leaves running."""
        held = "SELECT id FROM job WHERE status = 'running' AND dispatch_id = ANY(:held)"
        return [row.id for row in self.system.rows(held, held=self.held_by(server))]

    def quiet(self, load: RequestLoad | None = None) -> bool:
        """All that was asked for has ended; False when patience did first."""
        deadline = self.quiet_within_s
        return (load is None or self.system.wait_until(lambda: load.done, within_s=deadline)) and (
            self.system.wait_until(lambda: self.unfinished() == 0, within_s=deadline)
        )

    def refused(self, server: ServerProcess) -> int:
        """How many late settlements of this worker changed nothing, as its log says."""
        return self.system.log_of(server).count("lost its lease")

    def evidence(self) -> evidence.Evidence:
        """All that can be found out now. Waits for what may still be on its way out."""
        leftovers = self.system.lasting_orphans()
        jobs = evidence.read_jobs(self.system.sessions, self.label)
        return evidence.Evidence(
            submissions=self.client.submissions,
            answers=self.client.answers,
            tenants=self.system.tenants,
            jobs=jobs,
            batches=evidence.read_batches(self.system.sessions, self.client),
            images=evidence.read_images(self.system.bucket, jobs),
            trespasses=evidence.read_trespasses(self.client),
            leftovers=leftovers,
            colors_known=self.system.colors_known,
            deliveries=self._deliveries(),
        )

    def _deliveries(self) -> Mapping[str, Sequence[str]] | None:
        """Return the webhook-ids of each job, once no delivery is pending."""
        if self.receiver is None:
            return None
        pending = "SELECT count(*) FROM delivery WHERE status IN ('pending', 'sending')"
        self.system.wait_until(lambda: self.system.value(pending) == 0, within_s=90)
        return evidence.read_deliveries(self.receiver.got)

    def result(self) -> FaultResult:
        return self.judged(violations(self.evidence()))

    def judged(self, found: Sequence[Violation]) -> FaultResult:
        """The table's line, given what the checks found."""
        found = [*found, *self.missed]
        lost = sum(violation.invariant == "I1" for violation in found)
        duplicated = sum(violation.invariant == "I2" for violation in found)
        if self.late_tried != self.late_refused:
            what = f"{self.late_refused} of {self.late_tried} late writes were refused"
            found.append(Violation("fence", self.row, what))
        return FaultResult(
            row=self.row,
            fault=self.fault,
            injections=self.injections,
            jobs=sum(len(each.jobs) for each in self.client.submissions if each.id),
            lost=lost,
            duplicated=duplicated,
            late_tried=self.late_tried,
            late_refused=self.late_refused,
            recoveries=tuple(self.recoveries),
            seconds=time.monotonic() - self.began,
            violations=found,
            notes=tuple(self.notes),
        )


def report_result(found: Sequence[Violation]) -> str:
    """The violations by kind, and the first of them in words."""
    kinds = Counter(violation.invariant for violation in found)
    return "\n".join([str(dict(kinds)), *map(str, islice(found, 12))])


@contextmanager
def running(
    row: str,
    fault: str,
    system: SystemUnderTest,
    rng: random.Random,
    record: Callable[[FaultResult], None],
    *,
    receiver: Receiver | None = None,
) -> Iterator[FaultRun]:
    """A row: whatever its block did, all is healed, waited for, checked and written down."""
    run = FaultRun(row, fault, system, rng, receiver=receiver)
    try:
        yield run
    finally:
        system.recover()
    quiet = run.quiet()
    result = run.result()
    run.client.close()
    record(result)
    assert not result.violations, report_result(result.violations)
    assert quiet


def skipped(row: str, fault: str, why: str) -> FaultResult:
    """A line for a row that cannot run on this machine."""
    return FaultResult(row, fault, 0, 0, 0, 0, 0, 0, (), 0, (), skipped=why)
