"""Manifest: the result of every job of a batch, one line each, in row order."""

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


def jobs_of(sessions: Sessions, batch: Batch, *, with_image: bool = False) -> Iterator[Job]:
    """Yield a batch's jobs, each as its page is read. `with_image`: only jobs with an image.

    Each page has its own transaction, so that a slow client keeps none open.
    """
    position = func.row(Job.row_number, Job.image_number)
    jobs = select(Job).where(Job.tenant_id == batch.tenant_id, Job.batch_id == batch.id)
    if with_image:
        jobs = jobs.where(Job.image_key.is_not(None), Job.deleted_at.is_(None))
    jobs = jobs.order_by(Job.row_number, Job.image_number).limit(_PAGE)
    after = (0, 0)
    while True:
        with sessions.begin() as session:
            page = session.scalars(jobs.where(position > func.row(*after))).all()
        if not page:
            return
        yield from page
        after = (page[-1].row_number or 0, page[-1].image_number)


def file_name(job: Job, batch: Batch) -> str:
    """Return the file name of a job's image, in the archive and in every folder."""
    return file_names.in_batch(
        job.prompt,
        job.seed,
        OutputFormat(job.output_format),
        row_number=job.row_number or 0,
        image_number=job.image_number,
        digits=max(4, len(str(batch.total + batch.rejected))),
    )


def lines(sessions: Sessions, batch: Batch, store: ImageStore, *, url_ttl_s: int) -> Iterator[Line]:
    """Yield one line for each job. Its URL is presigned: it needs no key until it expires."""
    for job in jobs_of(sessions, batch):
        yield _line(job) | _image(job, batch, store, url_ttl_s)


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


def _image(job: Job, batch: Batch, store: ImageStore, url_ttl_s: int) -> Line:
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


def as_json_lines(lines_: Iterator[Line]) -> Iterator[bytes]:
    """Render manifest.jsonl."""
    for line in lines_:
        yield json.dumps(line, ensure_ascii=False).encode() + b"\n"


_COLUMNS: Final = (
    *("id", "custom_id", "row_number", "image_number", "status"),
    *("revision", *GenerationParams.model_fields),
    *("file", "key", "sha256", "bytes", "content_type", "url", "url_expires_at"),
    *("queued_ms", "inference_ms", "upload_ms", "error_code", "error_message"),
    *("created_at", "finished_at"),
)


def as_csv(lines_: Iterator[Line]) -> Iterator[bytes]:
    """Render manifest.csv: the same in columns, with formulas escaped."""
    yield _row(_COLUMNS)
    for line in lines_:
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


def _row(cells: Any) -> bytes:  # csv takes any iterable
    text = io.StringIO(newline="")
    csv.writer(text).writerow(cells)
    return text.getvalue().encode()
