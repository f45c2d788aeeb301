"""Client that records what it sent, what was answered, and what it cannot know.

It sends each request with an Idempotency-Key, again and again until it is answered, as a client
should. Its books are the truth that the server's rows are held against.
"""

import csv
import io
import json
import random
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

SIZE = {"width": 64, "height": 64, "num_inference_steps": 1}
SUCCEEDS = frozenset({"succeeded"})
FAILS = frozenset({"failed"})
_UNTIL_ANSWERED_S = 180
_PAUSE_S = 0.25


@dataclass(frozen=True)
class ExpectedImage:
    """One image, and the statuses in which its job may finish."""

    prompt: str
    seed: int
    ends: frozenset[str] = SUCCEEDS
    fields: tuple[tuple[str, object], ...] = ()


@dataclass
class SentRequest:
    """One request that makes one job, or a batch of them; what became of it."""

    tenant: int
    jobs: Sequence[ExpectedImage]
    as_batch: bool
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    ids: set[str] = field(default_factory=set)  #: more than one would be a duplicate submission
    unknown: int = 0  #: times that no answer came
    waited_s: float = 0.0  #: until it was answered

    @property
    def id(self) -> str | None:
        return next(iter(self.ids), None)


@dataclass
class RecordedResponse:
    """What the server said, whenever it said anything."""

    status: int
    retry_after: str | None
    code: str
    elapsed_s: float


class RecordingClient:
    """Two tenants' worth of requests to one API; one label marks all of it."""

    def __init__(self, url: str, keys: Sequence[str], label: str, log: Path) -> None:
        self.label = label
        self.keys = keys
        self.submissions: list[SentRequest] = []
        self.answers: list[RecordedResponse] = []
        self._lock = threading.Lock()
        self._log = log.open("a")
        self._clients = [
            httpx2.Client(
                base_url=url,
                timeout=20,
                headers={"Authorization": f"Bearer {key}"} if key else {},
            )
            for key in keys
        ]

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self._log.close()

    def submit(self, submission: SentRequest) -> str | None:
        """Ask until there is an answer; the id that was acknowledged."""
        with self._lock:
            self.submissions.append(submission)
        began = time.monotonic()
        while not self._ask(submission) and time.monotonic() < began + _UNTIL_ANSWERED_S:
            time.sleep(_PAUSE_S)
        submission.waited_s = time.monotonic() - began
        return submission.id

    def _ask(self, submission: SentRequest) -> bool:
        """Whether an answer came that settles it."""
        path, request = self._request(submission)
        try:
            response = self.post(submission.tenant, path, **request)
        except httpx2.TransportError:
            submission.unknown += 1
            self._note(submission, "no answer")
            return False
        if response.status_code in {200, 202}:
            submission.ids.add(response.json()["id"])
            self._note(submission, response.json()["id"])
            return True
        self._note(submission, response.status_code)
        return response.status_code < 500  # refused for good: the checks will find it unanswered

    def _request(self, submission: SentRequest) -> tuple[str, dict]:
        headers = {"Idempotency-Key": submission.key}
        if submission.as_batch:
            headers["Content-Type"] = "text/csv"
            return "/v1/batches", {"content": _csv(submission.jobs, self.label), "headers": headers}
        [wanted] = submission.jobs
        body = {"prompt": wanted.prompt, "seed": wanted.seed, "label": self.label}
        return "/v1/jobs", {"json": body | SIZE | dict(wanted.fields), "headers": headers}

    def post(self, tenant: int, path: str, **request: object) -> httpx2.Response:
        return self._answered(lambda: self._clients[tenant].post(path, **request))

    def get(self, path: str, *, tenant: int = 0) -> httpx2.Response:
        return self._answered(lambda: self._clients[tenant].get(path))

    def _answered(self, ask) -> httpx2.Response:
        began = time.monotonic()
        response = ask()
        is_problem = response.headers.get("content-type") == "application/problem+json"
        self.answers.append(
            RecordedResponse(
                response.status_code,
                response.headers.get("retry-after"),
                response.json()["code"] if is_problem else "",
                time.monotonic() - began,
            )
        )
        return response

    def _note(self, submission: SentRequest, answer: object) -> None:
        line = {"key": submission.key, "tenant": submission.tenant, "answer": answer}
        with self._lock:
            self._log.write(json.dumps(line | {"jobs": len(submission.jobs)}) + "\n")
            self._log.flush()


def _csv(jobs: Sequence[ExpectedImage], label: str) -> str:
    extra = dict(jobs[0].fields)
    columns = list(dict.fromkeys(["prompt", "seed", "label", *SIZE, *extra]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    for wanted in jobs:
        row = {"prompt": wanted.prompt, "seed": wanted.seed, "label": label}
        writer.writerow(row | SIZE | dict(wanted.fields))
    return text.getvalue()


def plan(
    rng: random.Random,
    jobs: int,
    *,
    largest: int = 100,
    prompts: Sequence[str] = ("a red apple",),
    fields: tuple[tuple[str, object], ...] = (),
) -> list[SentRequest]:
    """So many jobs of both tenants, as single jobs and as batches of up to `largest`."""
    submissions: list[SentRequest] = []
    while jobs > 0:
        as_batch = jobs > 1 and rng.random() < 0.5
        size = rng.randint(2, min(largest, jobs)) if as_batch else 1
        wanted = [
            ExpectedImage(rng.choice(prompts), rng.randrange(2**32), fields=fields)
            for _ in range(size)
        ]
        submissions.append(SentRequest(rng.randrange(2), wanted, as_batch))
        jobs -= size
    return submissions


class RequestLoad:
    """A plan that is submitted in the background by a few threads."""

    def __init__(
        self, client: RecordingClient, submissions: Sequence[SentRequest], *, threads: int = 4
    ):
        self._pool = ThreadPoolExecutor(threads)
        self._waiting = [self._pool.submit(client.submit, each) for each in submissions]
        self._pool.shutdown(wait=False)

    @property
    def done(self) -> bool:
        return all(each.done() for each in self._waiting)

    def stop(self) -> None:
        """What was not begun is not asked for any more."""
        for each in self._waiting:
            each.cancel()
