"""/v1/queue: how much is queued, and how fast it is generated."""

from http import HTTPStatus

from fastapi import APIRouter

from api.dependencies import Deps, TenantId
from api.errors import ProblemException, documented
from api.schemas.queue import QueueSnapshot

router = APIRouter(prefix="/v1/queue", tags=["queue"])


@router.get("", summary="Get the queue", responses=documented())
def get_queue(_: TenantId, deps: Deps) -> QueueSnapshot:
    """Return the number and age of queued jobs by priority and model, and the throughput.

    At most a second old, the depths two seconds; older for a very long queue, because counting may
    take a thirtieth of the time.
    """
    snapshot = deps.snapshot_cache.now()
    if snapshot is None:
        detail = "the queue could not be read from the database; try again"
        raise ProblemException(HTTPStatus.SERVICE_UNAVAILABLE, "queue_unavailable", detail)
    return QueueSnapshot.of(snapshot, deps.snapshot_cache.age_s(snapshot))
