"""/healthz and /readyz: liveness and readiness of the process."""

from http import HTTPStatus
from typing import Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from api.dependencies import Deps
from api.errors import problem
from darkroom.errors import InputProblem
from darkroom.health import OK, run_checks, server_checks

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """A process that answers."""

    status: Literal["ok"] = Field("ok", description="Always `ok`; otherwise the answer is a 503.")


@router.get("/healthz", summary="Check liveness")
async def get_health() -> Health:
    """Answer if the process is alive, whatever state its servers are in."""
    return Health()


@router.get("/readyz", summary="Check readiness", response_model=Health)
def get_readiness(deps: Deps) -> Health | JSONResponse:
    """Check that database, Redis and storage answer. Jobs are accepted without Redis too."""
    results = run_checks(server_checks(deps.sessions, deps.redis, deps.store))
    failing = [
        InputProblem((name,), "unavailable", result)
        for name, result in results.items()
        if result != OK
    ]
    if not failing:
        return Health()
    names = ", ".join(str(item.loc[0]) for item in failing)
    detail = f"cannot reach {names}; check the server and its DARKROOM_* settings"
    return problem(HTTPStatus.SERVICE_UNAVAILABLE, "not_ready", detail, errors=failing)
