"""What is found when all is quiet again: the server's rows and objects, and the client's books."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from sqlalchemy import text

from darkroom.db.connection import Sessions
from darkroom.generation.image_codec import METADATA_KEY
from tests.chaos.client import RecordedResponse, RecordingClient, SentRequest
from tests.support.webhook_receiver import Received

ENDS = ("job.succeeded", "job.failed", "job.canceled", "job.expired")


@dataclass(frozen=True)
class JobRow:
    """A job as the database has it, and how often an end of it was recorded."""

    id: str
    tenant_id: str
    status: str
    prompt: str
    seed: int
    batch_id: str | None
    row_number: int | None
    image_key: str | None
    image_sha256: str | None
    error_code: str | None
    attempt: int
    ends: int


@dataclass(frozen=True)
class BatchRow:
    """A batch as the database has it, how often its end was recorded, and what the API counts."""

    id: str
    total: int
    finished: bool
    ends: int
    counts: Mapping[str, int]


@dataclass(frozen=True)
class StoredImage:
    """What lies in the store: its hash, whose it says it is, its color when it has only one."""

    sha256: str
    job_id: str | None
    color: tuple[int, ...] | None


@dataclass(frozen=True)
class Evidence:
    """All that the checks look at."""

    submissions: Sequence[SentRequest]
    answers: Sequence[RecordedResponse]
    tenants: Sequence[str]
    jobs: Sequence[JobRow]
    batches: Mapping[str, BatchRow]
    images: Mapping[str, StoredImage]
    #: what a tenant was shown of the other's: (path, status)
    trespasses: Sequence[tuple[str, int]] = ()
    #: what should not be there any more: open dispatches, orphans, forgotten transactions
    leftovers: Sequence[str] = ()
    #: whether images are those of `tests.chaos.replica`, whose color is known
    colors_known: bool = True
    #: accepted deliveries of each job's webhook, by webhook-id; None without a receiver
    deliveries: Mapping[str, Sequence[str]] | None = field(default=None)


_JOBS = text(
    """SELECT job.id, job.tenant_id, job.status, job.prompt, job.seed, job.batch_id,
        job.row_number, job.image_key, job.image_sha256, job.error_code, job.attempt,
        (SELECT count(*) FROM event WHERE event.job_id = job.id AND type = ANY(:ends)) AS ends
    FROM job WHERE job.label = :label"""
)
_BATCHES = text(
    """SELECT batch.id, total, finished_at IS NOT NULL AS finished,
        (SELECT count(*) FROM event WHERE event.batch_id = batch.id AND event.job_id IS NULL
            AND type IN ('batch.completed', 'batch.canceled')) AS ends
    FROM batch WHERE id = ANY(:ids)"""
)


def read_jobs(sessions: Sessions, label: str) -> list[JobRow]:
    with sessions.begin() as session:
        found = session.execute(_JOBS, {"label": label, "ends": list(ENDS)})
        return [JobRow(**row._mapping) for row in found]


def read_batches(sessions: Sessions, client: RecordingClient) -> dict[str, BatchRow]:
    """Those that the client knows of, with the counts that the API shows it."""
    owners = {each.id: each.tenant for each in client.submissions if each.as_batch and each.id}
    with sessions.begin() as session:
        found = session.execute(_BATCHES, {"ids": list(owners)}).all()
    return {
        row.id: BatchRow(
            **row._mapping,
            counts=client.get(f"/v1/batches/{row.id}", tenant=owners[row.id]).json()["counts"],
        )
        for row in found
    }


def read_images(bucket: Path, jobs: Sequence[JobRow]) -> dict[str, StoredImage]:
    """What lies under the keys that the jobs name; nothing for a key under which nothing lies."""
    keys = [job.image_key for job in jobs if job.image_key is not None]
    return {key: _image(bucket / key) for key in keys if (bucket / key).exists()}


def _image(file: Path) -> StoredImage:
    stored = file.read_bytes()
    sha256 = hashlib.sha256(stored).hexdigest()
    try:
        with Image.open(io.BytesIO(stored)) as image:
            about = json.loads(image.text[METADATA_KEY])
            [(_, color), *others] = image.getcolors(image.width * image.height)
    except (OSError, KeyError, ValueError, SyntaxError):
        return StoredImage(sha256, None, None)
    return StoredImage(sha256, about["id"], None if others else color)


def read_deliveries(got: Sequence[Received]) -> dict[str, list[str]]:
    """Return the webhook-ids of accepted finish events, by job."""
    deliveries: dict[str, list[str]] = {}
    for received in got:
        about = received.json["data"]
        for job in about["data"] if about["object"] == "list" else [about]:
            deliveries.setdefault(job["id"], []).append(received.id)
    return deliveries


def read_trespasses(client: RecordingClient, *, at_most: int = 5) -> list[tuple[str, int]]:
    """Return what each tenant can read of the other's objects."""
    paths = [
        (f"/v1/{'batches' if each.as_batch else 'jobs'}/{each.id}", 1 - each.tenant)
        for each in client.submissions
        if each.id is not None
    ]
    if len(set(client.keys)) == 1:
        return []  # there is no second tenant
    step = max(1, len(paths) // at_most)
    return [(path, client.get(path, tenant=other).status_code) for path, other in paths[::step]]
