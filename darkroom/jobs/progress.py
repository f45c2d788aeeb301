"""How far the jobs being drawn have come. It lives in Redis: nothing needs it, and it expires.

One hash for each dispatch, job id to "step/steps", so that a job that is drawn again does not show
the steps of its last time.
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

Steps: TypeAlias = tuple[int, int]  #: how many are done, and of how many

_EXPIRY_S: Final = 60  #: after the last step: longer than any step takes
_PATIENCE_S: Final = 0.2  #: nobody waits longer for a progress bar
_STEPS: Final = re.compile(rb"(\d{1,6})/(\d{1,6})")


def open_progress_redis(settings: Settings) -> Redis:
    """A client for `publish` and `read` whose commands end soon, whatever Redis does."""
    return open_redis(settings, timeout_s=_PATIENCE_S)


def publish(redis: Redis, dispatches: Mapping[int, Mapping[str, Steps]]) -> None:
    """Say where jobs are, by dispatch and job id, in one round trip. Raises RedisError."""
    with redis.pipeline(transaction=False) as pipe:
        for dispatch_id, jobs in dispatches.items():
            pairs = [(job_id, f"{step}/{steps}") for job_id, (step, steps) in jobs.items()]
            pipe.hset(_key(dispatch_id), items=list(chain.from_iterable(pairs)))
            pipe.expire(_key(dispatch_id), _EXPIRY_S)
        pipe.execute()


def read(redis: Redis, jobs: Iterable[Job]) -> dict[str, Steps]:
    """Where those of the jobs are that run, by job id, in one round trip.

    What is not known is left out; that is all of them while Redis cannot be reached.
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
    known = {job.id: _steps(text) for job, text in zip(running, texts, strict=True)}
    return {job_id: steps for job_id, steps in known.items() if steps is not None}


def _steps(text: object) -> Steps | None:
    """None also for what is not ours: anybody may have written into Redis."""
    found = _STEPS.fullmatch(text) if isinstance(text, bytes) else None
    return (int(found[1]), int(found[2])) if found else None


def _key(dispatch_id: int) -> str:
    return f"darkroom:progress:{dispatch_id}"
