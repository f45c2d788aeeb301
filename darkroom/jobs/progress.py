"""Step progress of running jobs, in Redis: it expires, and no other part depends on it.

One hash per dispatch, job id to "step/steps", so that a requeued job does not show the steps of
its last attempt.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Final, TypeAlias

from redis import Redis, RedisError

from darkroom.db.tables import Job
from darkroom.redis_client import open_redis
from darkroom.settings import Settings
from darkroom.status import Status

Steps: TypeAlias = tuple[int, int]  #: done, total

_EXPIRY_S: Final = 60  #: after the last step: longer than any step takes
_TIMEOUT_S: Final = 0.2  #: as long as a request may wait for a progress bar
_STEPS: Final = re.compile(rb"(\d{1,6})/(\d{1,6})")


def open_progress_redis(settings: Settings) -> Redis:
    """Return a client for `publish` and `read` with a short timeout."""
    return open_redis(settings, timeout_s=_TIMEOUT_S)


def publish(redis: Redis, dispatches: Mapping[int, Mapping[str, Steps]]) -> None:
    """Publish the steps of jobs, by dispatch and job id, in one round trip. Raises RedisError."""
    with redis.pipeline(transaction=False) as pipe:
        for dispatch_id, jobs in dispatches.items():
            pairs = [(job_id, f"{step}/{steps}") for job_id, (step, steps) in jobs.items()]
            pipe.hset(_key(dispatch_id), items=list(chain.from_iterable(pairs)))
            pipe.expire(_key(dispatch_id), _EXPIRY_S)
        pipe.execute()


def read(redis: Redis, jobs: Iterable[Job]) -> dict[str, Steps]:
    """Return the known steps of the running jobs, by job id, in one round trip.

    Return nothing if Redis is unreachable.
    """
    running = [job for job in jobs if job.status == Status.RUNNING and job.dispatch_id is not None]
    if not running:
        return {}
    try:
        with redis.pipeline(transaction=False) as pipe:
            for job in running:
                pipe.hget(_key(job.dispatch_id or 0), job.id)
            texts = pipe.execute(raise_on_error=False)
    except RedisError:
        return {}
    parsed = {job.id: _steps(text) for job, text in zip(running, texts, strict=True)}
    return {job_id: steps for job_id, steps in parsed.items() if steps is not None}


def _steps(text: object) -> Steps | None:
    """Parse a value; None if it is malformed, as Redis may be written by other programs."""
    match = _STEPS.fullmatch(text) if isinstance(text, bytes) else None
    return (int(match[1]), int(match[2])) if match else None


def _key(dispatch_id: int) -> str:
    return f"darkroom:progress:{dispatch_id}"
