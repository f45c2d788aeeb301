"""What became of a batch, one line for each job, in the order of its rows."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import func, select

from darkroom import csv_escape
from darkroom.db.connection import Sessions
from darkroom.db.tables import Batch, Job
from darkroom.generation import file_names
from darkroom.generation.image_codec import CONTENT_TYPES
from darkroom.generation.params import GenerationParams, revision_in
from darkroom.rfc3339 import rfc3339
from darkroom.status import OutputFormat
from darkroom.storage.images import ImageStore

Line = dict[str, Any]

_PAGE: Final = 500  # jobs of one transaction


def jobs_of(sessions: Sessions, batch: Batch, *, drawn: bool = False) -> Iterator[Job]:
    """The batch's jobs as each is when its page is read; `drawn`: only those with an image.

    A transaction for each page, so that a slow reader holds nothing open.
    """
    place = func.row(Job.row_number, Job.image_number)
    jobs = select(Job).where(Job.tenant_id == batch.tenant_id, Job.batch_id == batch.id)
    if drawn:
        jobs = jobs.where(Job.image_key.is_not(None), Job.deleted_at.is_(None))
    jobs = jobs.order_by(Job.row_number, Job.image_number).limit(_PAGE)
    after = (0, 0)
    while True:
        with sessions.begin() as session:
            page = session.scalars(jobs.where(place > func.row(*after))).all()
        if not page:
            return
        yield from page
        after = (page[-1].row_number or 0, page[-1].image_number)


def file_name(job: Job, batch: Batch) -> str:
    """Of the job's picture, in the archive and in every folder."""
    return file_names.in_batch(
        job.prompt,
        job.seed,
        OutputFormat(job.output_format),
        row_number=job.row_number or 0,
        image_number=job.image_number,
        digits=max(4, len(str(batch.total + batch.rejected))),
    )


def lines(sessions: Sessions, batch: Batch, store: ImageStore, *, url_ttl_s: int) -> Iterator[Line]:
    """One for each job; the URL is fresh, and works without a key until it expires."""
    for job in jobs_of(sessions, batch):
        yield _line(job) | _picture(job, batch, store, url_ttl_s)


def _line(job: Job) -> Line:
    failed = job.error_code is not None
    error = {
        "code": job.error_code,
        "message": job.error_message,
        "retryable": job.error_retryable,
    }
    queued = None if job.started_at is None else job.started_at - job.created_at
    return {
        "id": job.id,
        "custom_id": job.custom_id,
        "row_number": job.row_number,
        "image_number": job.image_number,
        "status": job.status,
        "seed": job.seed,
        "revision": revision_in(job.microbatch_key),
        "parameters": GenerationParams.model_validate(job).model_dump(mode="json"),
        "label": job.label,
        "metadata": job.metadata_,
        "timings": {
            "queued_ms": None if queued is None else round(queued.total_seconds() * 1000),
            "inference_ms": job.inference_ms,
            "upload_ms": job.upload_ms,
        },
        "error": error if failed else None,
        "created_at": rfc3339(job.created_at),
        "finished_at": job.finished_at and rfc3339(job.finished_at),
    }


def _picture(job: Job, batch: Batch, store: ImageStore, url_ttl_s: int) -> Line:
    names = ("file", "key", "sha256", "bytes", "content_type", "url", "url_expires_at")
    if job.image_key is None or job.deleted_at is not None:
        return dict.fromkeys(names)
    values = (
        file_name(job, batch),
        job.image_key,
        job.image_sha256,
        job.image_bytes,
        CONTENT_TYPES[OutputFormat(job.output_format)],
        store.presign(job.image_key, ttl_s=url_ttl_s),
        rfc3339(datetime.now(UTC) + timedelta(seconds=url_ttl_s)),
    )
    return dict(zip(names, values, strict=True))


def as_json_lines(found: Iterator[Line]) -> Iterator[bytes]:
    """manifest.jsonl."""
    for line in found:
        yield json.dumps(line, ensure_ascii=False).encode() + b"\n"


_COLUMNS: Final = (
    *("id", "custom_id", "row_number", "image_number", "status"),
    *("revision", *GenerationParams.model_fields),
    *("file", "key", "sha256", "bytes", "content_type", "url", "url_expires_at"),
    *("queued_ms", "inference_ms", "upload_ms", "error_code", "error_message"),
    *("created_at", "finished_at"),
)


def as_csv(found: Iterator[Line]) -> Iterator[bytes]:
    """manifest.csv: the same in columns; what a spreadsheet would run is escaped."""
    yield _row(_COLUMNS)
    for line in found:
        error = line["error"] or {"code": None, "message": None}
        flat: Mapping[str, object] = {
            **line["parameters"],
            **line["timings"],
            **line,
            "error_code": error["code"],
            "error_message": error["message"],
        }
        values = (flat[name] for name in _COLUMNS)
        yield _row("" if value is None else csv_escape.escape(str(value)) for value in values)


def _row(cells: Any) -> bytes:  # anything that csv takes for a row
    text = io.StringIO(newline="")
    csv.writer(text).writerow(cells)
    return text.getvalue().encode()
