"""/v1/jobs: submit, get, wait, list, cancel, retry, delete, fetch the image."""

import asyncio
import logging
import re
import time
from dataclasses import replace
from http import HTTPStatus
from typing import Annotated, Final

from fastapi import APIRouter, Header, Query, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse

from api.dependencies import Dependencies, Deps, TenantId
from api.errors import documented
from api.idempotency import Key, respond
from api.parameters import Cursor, JobId, Limit, next_cursor
from api.rendering import render_job, render_jobs
from api.schemas.jobs import Job, JobList
from darkroom import fault_points, idempotency
from darkroom.db.connection import Sessions
from darkroom.errors import ImageNotReady, StorageUnavailable
from darkroom.forecast import queue_position
from darkroom.generation.params import JobInput, Label
from darkroom.idempotency import StoredResponse
from darkroom.jobs import deletion, lifecycle, queries
from darkroom.jobs.bulk_insert import NewJob
from darkroom.status import FINISHED, Status
from darkroom.storage.images import ImageStore
from darkroom.webhooks import endpoints

MAX_WAIT_S: Final = 60
_POLL_S: Final = (0.05, 0.1, 0.2, 0.4)  # then the last, until the time is up

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

Prefer = Annotated[
    str | None,
    Header(
        description="`wait=SECONDS`, at most 60: respond once the job has finished or the time is "
        "up. Default: at once."
    ),
]


@router.post(
    "",
    summary="Submit a job",
    status_code=HTTPStatus.ACCEPTED,
    response_model=Job,
    responses={
        HTTPStatus.OK.value: {"model": Job, "description": "Repeated request; nothing was created"},
        **documented(HTTPStatus.CONFLICT, HTTPStatus.UNPROCESSABLE_ENTITY),
    },
)
async def create_job(
    job: JobInput, tenant_id: TenantId, deps: Deps, prefer: Prefer = None, key: Key = None
) -> Response:
    """Queue one image. A 202 means that the job is committed and reaches a final status."""
    new_job = _new_job(deps, job)
    if key is None:
        accepted = await deps.group_committer.submit(tenant_id, new_job)
        if deps.snapshot_cache.recall() is None:
            await run_in_threadpool(deps.snapshot_cache.now)
        stored = StoredResponse(render_job(deps, accepted).model_dump_json(), replayed=False)
    else:
        stored = await run_in_threadpool(_submit_once, deps, tenant_id, job, new_job, key)
    deps.notifier.notify_workers()  # after the commit, so that the worker it wakes can see the row
    seconds = _seconds(prefer)
    if not seconds:
        return respond(stored)
    submitted = Job.model_validate_json(stored.body)
    latest = await _wait(deps, tenant_id, submitted.id, seconds)
    return respond(replace(stored, body=latest.model_dump_json()))


def _new_job(deps: Dependencies, job: JobInput) -> NewJob:
    params = deps.registry.resolve(job)
    endpoints.check_own_url(job.webhook_url, deps.url_policy)
    return NewJob.of(job, params, deps.registry.models[params.model].microbatch_key(params))


def _submit_once(
    deps: Dependencies, tenant_id: str, job: JobInput, new_job: NewJob, key: str
) -> StoredResponse:
    """Submit with an Idempotency-Key; its response is committed together with the job."""
    with deps.sessions.begin() as session:

        def act() -> str:
            [job_id] = lifecycle.submit(session, tenant_id, [new_job])
            return render_job(deps, queries.find(session, tenant_id, job_id)).model_dump_json()

        asked = b"job " + job.model_dump_json().encode()
        stored = idempotency.once(session, tenant_id, key, request=asked, act=act)
        fault_points.fault_point("before-submit-commit")
    fault_points.fault_point("after-submit-commit")
    return stored


@router.get(
    "/{job_id}",
    summary="Get a job",
    responses={
        HTTPStatus.NOT_MODIFIED.value: {"description": "Unchanged since the `If-None-Match` ETag"},
        **documented(HTTPStatus.NOT_FOUND, HTTPStatus.GONE),
    },
)
async def get_job(
    job_id: JobId,
    tenant_id: TenantId,
    deps: Deps,
    response: Response,
    prefer: Prefer = None,
    if_none_match: Annotated[
        str | None, Header(description="The `ETag` of the last response: 304 if nothing changed.")
    ] = None,
) -> Job:
    """Return the job now, or with `Prefer: wait` once it has finished."""
    job = await _wait(deps, tenant_id, job_id, _seconds(prefer))
    step = job.progress.step if job.progress else None
    place = job.queue and (job.queue.position, job.queue.eta_s_p50)
    etag = f'W/"{job.status}-{job.attempt}-{step}-{place}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if if_none_match is not None and etag in if_none_match:
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)  # type: ignore[return-value]
    response.headers.update(headers)
    return job


def _seconds(prefer: str | None) -> float:
    """Return the N of `Prefer: wait=N` (RFC 7240); anything else is no preference."""
    wanted = re.search(r"\bwait=(\d{1,4})\b", prefer or "")
    return min(float(wanted[1]), MAX_WAIT_S) if wanted else 0


async def _wait(deps: Dependencies, tenant_id: str, job_id: str, seconds: float) -> Job:
    deadline = time.monotonic() + seconds
    pauses = iter(_POLL_S)
    while True:
        job = await run_in_threadpool(_find, deps, tenant_id, job_id)
        left = deadline - time.monotonic()
        if job.status in FINISHED or left <= 0:
            return job
        await asyncio.sleep(min(left, next(pauses, _POLL_S[-1])))


def _find(deps: Dependencies, tenant_id: str, job_id: str) -> Job:
    with deps.sessions.begin() as session:
        job = queries.find(session, tenant_id, job_id)
        queued = job.status == Status.QUEUED and not job.paused
        position = queue_position.position(session, job) if queued else None
    if queued:
        deps.snapshot_cache.now()
    return render_job(deps, job, position=position)


@router.get("", summary="List jobs", responses=documented(HTTPStatus.UNPROCESSABLE_ENTITY))
def list_jobs(
    tenant_id: TenantId,
    deps: Deps,
    status: Annotated[Status | None, Query(description="Only jobs with this status.")] = None,
    batch_id: Annotated[
        str | None, Query(pattern=r"^bat_[0-9a-f]{32}$", description="Only jobs of this batch.")
    ] = None,
    label: Annotated[Label | None, Query(description="Only jobs with this label.")] = None,
    limit: Limit = 20,
    cursor: Cursor = None,
) -> JobList:
    """Return jobs, newest first; those of a batch in the order of its rows."""
    with deps.sessions.begin() as session:
        found = queries.page(
            session,
            tenant_id,
            limit=limit + 1,
            after=cursor,
            status=status,
            batch_id=batch_id,
            label=label,
        )
    return JobList(data=render_jobs(deps, found[:limit]), next_cursor=next_cursor(found, limit))


@router.get(
    "/{job_id}/image",
    summary="Get the image of a job",
    status_code=HTTPStatus.FOUND,
    response_class=RedirectResponse,
    responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.GONE, HTTPStatus.CONFLICT),
)
def get_job_image(job_id: JobId, tenant_id: TenantId, deps: Deps) -> RedirectResponse:
    """Redirect to a fresh URL of the image, which needs no key and accepts none."""
    with deps.sessions.begin() as session:
        job = queries.find(session, tenant_id, job_id)
    if job.image_key is None:
        raise ImageNotReady(
            f"job {job_id} is {job.status} and has no image; wait until it succeeds"
        )
    url = deps.store.presign(job.image_key, ttl_s=deps.settings.image_url_ttl_s)
    return RedirectResponse(url, HTTPStatus.FOUND, headers={"Cache-Control": "no-store"})


@router.post(
    "/{job_id}/cancel",
    summary="Cancel a job",
    responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.GONE),
)
def cancel_job(job_id: JobId, tenant_id: TenantId, deps: Deps) -> Job:
    """Cancel a queued job at once, a running one within about a step. No-op once finished."""
    with deps.sessions.begin() as session:
        job = render_job(deps, lifecycle.cancel(session, tenant_id, job_id))
    deps.notifier.notify_webhook_senders()
    return job


@router.post(
    "/{job_id}/retry",
    summary="Retry a job",
    status_code=HTTPStatus.ACCEPTED,
    responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.GONE, HTTPStatus.CONFLICT),
)
def retry_job(job_id: JobId, tenant_id: TenantId, deps: Deps) -> Job:
    """Submit the same input as a new job. A second retry returns the same new job."""
    with deps.sessions.begin() as session:
        job = render_job(deps, lifecycle.retry(session, tenant_id, job_id))
    deps.notifier.notify_workers()
    return job


@router.delete(
    "/{job_id}",
    summary="Delete a job",
    status_code=HTTPStatus.NO_CONTENT,
    responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.GONE, HTTPStatus.CONFLICT),
)
def delete_job(job_id: JobId, tenant_id: TenantId, deps: Deps) -> None:
    """Delete the image, the prompt and all other input. The job answers 410 from then on."""
    with deps.sessions.begin() as session:
        image_key = deletion.delete(session, tenant_id, job_id)
    if image_key is not None:
        _remove_image(deps.sessions, deps.store, job_id, image_key)


def _remove_image(sessions: Sessions, store: ImageStore, job_id: str, image_key: str) -> None:
    try:
        store.delete(image_key)
    except StorageUnavailable as error:
        logger.warning(
            "could not delete the image of deleted job %s: %s; the cleaner deletes it later",
            job_id,
            error,
        )
        return
    with sessions.begin() as session:
        deletion.forget_image(session, [job_id])
