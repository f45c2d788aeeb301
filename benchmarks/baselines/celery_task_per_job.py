"""Baseline for `benchmarks/submit_rate.py`: the same POST /v1/jobs with a Celery task per job.

The usual way: validate, `send_task`, respond. No database has the job when its client is told.
"""

from datetime import UTC, datetime
from http import HTTPStatus

import uvicorn
from fastapi import FastAPI, Response

from api.app import create_app
from api.dependencies import Deps, TenantId
from api.rendering import render_job
from darkroom.db.tables import Job
from darkroom.generation import params
from darkroom.generation.params import JobInput
from darkroom.ids import new_id
from darkroom.queue.celery_app import GENERATE_QUEUE, celery_app
from darkroom.settings import Settings, load_settings


def task_app(settings: Settings) -> FastAPI:
    """Return our own app with its POST /v1/jobs replaced."""
    app = create_app(settings)
    celery = celery_app(settings, socket_timeout_s=5)

    def create_job(job: JobInput, tenant_id: TenantId, use: Deps) -> Response:
        asked = use.registry.resolve(job)
        key = use.registry.models[asked.model].microbatch_key(asked)
        row = asked.model_dump() | {"id": new_id("job"), "microbatch_key": key}
        celery.send_task("draw", args=[row, tenant_id], queue=GENERATE_QUEUE)
        now = datetime.now(UTC)
        queued = Job(
            **row,
            tenant_id=tenant_id,
            metadata_=job.metadata,
            status="queued",
            attempt=0,
            priority=1,
            cost=params.cost(asked),
            start_tag=0.0,
            paused=False,
            created_at=now,
        )
        body = render_job(use, queued).model_dump_json()
        return Response(body, HTTPStatus.ACCEPTED, media_type="application/json")

    app.post("/v1/jobs")(create_job)
    app.router.routes.insert(0, app.router.routes.pop())  # the first match is used
    return app


if __name__ == "__main__":
    settings = load_settings()
    uvicorn.run(task_app(settings), host="127.0.0.1", port=settings.api_port)
