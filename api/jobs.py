"""/v1/jobs: submit, look, wait, list, fetch the image."""

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
from api.schemas.common import Page
from api.schemas.jobs import JobView
from darkroom import fault_points, idempotency
from darkroom.errors import ImageNotReady, StorageUnavailable
from darkroom.forecast import queue_position
from darkroom.generation.params import JobInput, Label
from darkroom.idempotency import StoredResponse
from darkroom.jobs import deletion, lifecycle, queries
from darkroom.jobs.bulk_insert import NewJob
from darkroom.status import FINISHED, Status
from darkroom.webhooks import endpoints

MAX_WAIT_S: Final = 60
_POLL_S: Final = (0.05, 0.1, 0.2, 0.4)  # then the last, until the time is up

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

Prefer = Annotated[
    str | None, Header(description="`wait=SECONDS`, at most 60: answer when the job has ended.")
]
Limit = Annotated[int, Query(ge=1, le=100)]
Cursor = Annotated[str | None, Query(pattern=r"^(job|bat)_[0-9a-f]{32}$")]


@router.post(
    "",
    status_code=HTTPStatus.ACCEPTED,
    response_model=JobView,
    responses=documented(HTTPStatus.CONFLICT, HTTPStatus.UNPROCESSABLE_ENTITY),
)
async def create_job(
    job: JobInput, tenant_id: TenantId, deps: Deps, prefer: Prefer = None, key: Key = None
) -> Response:
    """Queue one picture. The 202 means it is committed: it will be drawn, whatever dies."""
    new_job = _new_job(deps, job)
    if key is None:
        accepted = await deps.group_committer.submit(tenant_id, new_job)
        if deps.snapshot_cache.recall() is None:
            await run_in_threadpool(deps.snapshot_cache.now)
        answer = StoredResponse(deps.job_view(accepted).model_dump_json(), replayed=False)
    else:
        answer = await run_in_threadpool(_submit_once, deps, tenant_id, job, new_job, key)
    deps.notifier.notify_workers()  # after the commit, so that the worker it wakes can see the row
    seconds = _seconds(prefer)
    if not seconds:
        return respond(answer)
    submitted = JobView.model_validate_json(answer.body)
    ended = await _wait(deps, tenant_id, submitted.id, seconds)
    return respond(replace(answer, body=ended.model_dump_json()))


def _new_job(deps: Dependencies, job: JobInput) -> NewJob:
    params = deps.registry.resolve(job)
    endpoints.check_own_url(job.webhook_url, deps.policy)
    return NewJob.of(job, params, deps.registry.models[params.model].microbatch_key(params))


def _submit_once(
    deps: Dependencies, tenant_id: str, job: JobInput, new_job: NewJob, key: str
) -> StoredResponse:
    """With an Idempotency-Key, whose answer is committed together with the job."""
    with deps.sessions.begin() as session:

        def act() -> str:
            [job_id] = lifecycle.submit(session, tenant_id, [new_job])
            return deps.job_view(queries.find(session, tenant_id, job_id)).model_dump_json()

        asked = b"job " + job.model_dump_json().encode()
        answer = idempotency.once(session, tenant_id, key, request=asked, act=act)
        fault_points.fault_point("before-submit-commit")
    fault_points.fault_point("after-submit-commit")
    return answer


@router.get("/{job_id}", responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.GONE))
async def show_job(
    job_id: str,
    tenant_id: TenantId,
    deps: Deps,
    response: Response,
    prefer: Prefer = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> JobView:
    """The job now, or with `Prefer: wait` once it has ended."""
    view = await _wait(deps, tenant_id, job_id, _seconds(prefer))
    step = view.progress.step if view.progress else None
    place = view.queue and (view.queue.position, view.queue.eta_s_p50)
    etag = f'W/"{view.status}-{view.attempt}-{step}-{place}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if if_none_match is not None and etag in if_none_match:
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)  # type: ignore[return-value]
    response.headers.update(headers)
    return view


def _seconds(prefer: str | None) -> float:
    """What `Prefer: wait=N` asks for (RFC 7240); anything else is no preference."""
    wanted = re.search(r"\bwait=(\d{1,4})\b", prefer or "")
    return min(float(wanted[1]), MAX_WAIT_S) if wanted else 0


async def _wait(deps: Dependencies, tenant_id: str, job_id: str, seconds: float) -> JobView:
    deadline = time.monotonic() + seconds
    pauses = iter(_POLL_S)
    while True:
        view = await run_in_threadpool(_show, deps, tenant_id, job_id)
        left = deadline - time.monotonic()
        if view.status in FINISHED or left <= 0:
            return view
        await asyncio.sleep(min(left, next(pauses, _POLL_S[-1])))


def _show(deps: Dependencies, tenant_id: str, job_id: str) -> JobView:
    with deps.sessions.begin() as session:
        job = queries.find(session, tenant_id, job_id)
        waits = job.status == Status.QUEUED and not job.paused
        position = queue_position.position(session, job) if waits else None
    if waits:
        deps.snapshot_cache.now()
    return deps.job_view(job, position=position)


@router.get("", responses=documented(HTTPStatus.UNPROCESSABLE_ENTITY))
def list_jobs(
    tenant_id: TenantId,
    deps: Deps,
    status: Status | None = None,
    batch_id: Annotated[str | None, Query(pattern=r"^bat_[0-9a-f]{32}$")] = None,
    label: Annotated[Label | None, Query()] = None,
    limit: Limit = 20,
    cursor: Cursor = None,
) -> Page[JobView]:
    """Newest first; the jobs of a batch in the order of its rows."""
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
    views = deps.job_views(found[:limit])
    return Page(data=views, next_cursor=views[-1].id if len(found) > limit else None)


@router.get(
    "/{job_id}/image",
    status_code=HTTPStatus.FOUND,
    response_class=RedirectResponse,
    responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.GONE, HTTPStatus.CONFLICT),
)
def show_image(job_id: str, tenant_id: TenantId, deps: Deps) -> RedirectResponse:
    """Redirects to a fresh URL of the image, which needs no key."""
    with deps.sessions.begin() as session:
        job = queries.find(session, tenant_id, job_id)
    if job.image_key is None:
        raise ImageNotReady(f"job {job_id} is {job.status}; it has no image")
    url = deps.store.presign(job.image_key, ttl_s=deps.settings.image_url_ttl_s)
    return RedirectResponse(url, HTTPStatus.FOUND, headers={"Cache-Control": "no-store"})


@router.post("/{job_id}/cancel", responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.GONE))
def cancel_job(job_id: str, tenant_id: TenantId, deps: Deps) -> JobView:
    """A queued job ends at once, a running one within about a step; one that has ended stays."""
    with deps.sessions.begin() as session:
        view = deps.job_view(lifecycle.cancel(session, tenant_id, job_id))
    deps.notifier.notify_webhook_senders()
    return view


@router.post(
    "/{job_id}/retry",
    status_code=HTTPStatus.ACCEPTED,
    responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.GONE, HTTPStatus.CONFLICT),
)
def retry_job(job_id: str, tenant_id: TenantId, deps: Deps) -> JobView:
    """A new job that asks for the same; asked again, it is the same new job."""
    with deps.sessions.begin() as session:
        view = deps.job_view(lifecycle.retry(session, tenant_id, job_id))
    deps.notifier.notify_workers()
    return view


@router.delete(
    "/{job_id}",
    status_code=HTTPStatus.NO_CONTENT,
    responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.GONE, HTTPStatus.CONFLICT),
)
def delete_job(job_id: str, tenant_id: TenantId, deps: Deps) -> None:
    """Removes the image and all that was written about it; from then on the job answers 410."""
    with deps.sessions.begin() as session:
        image_key = deletion.delete(session, tenant_id, job_id)
    if image_key is not None:
        _remove_image(deps, job_id, image_key)


def _remove_image(deps: Dependencies, job_id: str, image_key: str) -> None:
    try:
        deps.store.delete(image_key)
    except StorageUnavailable as error:
        logger.warning("the image of deleted job %s is left to the sweeper: %s", job_id, error)
        return
    with deps.sessions.begin() as session:
        deletion.forget_image(session, [job_id])
