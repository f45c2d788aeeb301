"""/healthz and /readyz: for those who watch over the process."""

from http import HTTPStatus
from typing import Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from api.dependencies import Deps
from api.errors import problem
from darkroom.errors import InputProblem
from darkroom.health import OK, run_checks, server_checks

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


@router.get("/healthz")
async def healthz() -> Health:
    """Whether the process itself is alive; asks nobody else."""
    return Health()


@router.get("/readyz", response_model=Health)
def readyz(deps: Deps) -> Health | JSONResponse:
    """Whether database, Redis and storage can be reached. Without Redis, jobs are still taken."""
    results = run_checks(server_checks(deps.sessions, deps.redis, deps.store))
    failing = [
        InputProblem((name,), "unavailable", result)
        for name, result in results.items()
        if result != OK
    ]
    if not failing:
        return Health()
    names = ", ".join(str(item.loc[0]) for item in failing)
    detail = f"cannot reach: {names}"
    return problem(HTTPStatus.SERVICE_UNAVAILABLE, "not_ready", detail, errors=failing)
