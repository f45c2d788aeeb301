"""One conversation with the API: where it is, what to print, how to exit."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import typer
from rich.console import Console
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from darkroom.client.http import ApiError, Client, Unreachable
from darkroom.db.connection import Sessions, open_sessions
from darkroom.errors import SetupError
from darkroom.settings import load_settings

EXIT_OK: Final = 0
EXIT_JOB_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3
DEFAULT_API: Final = "http://127.0.0.1:8000"
_PROBLEMS_SHOWN: Final = 20

Json = dict[str, Any]


def console() -> Console:
    """For people: progress and errors go to standard error, results to standard output."""
    return Console(stderr=True, highlight=False)


@contextmanager
def api() -> Iterator[Client]:
    """A client of DARKROOM_API; its errors become one clear line and the right exit code."""
    url = os.environ.get("DARKROOM_API", DEFAULT_API)
    try:
        with Client(url, api_key=os.environ.get("DARKROOM_API_KEY")) as client:
            yield client
    except Unreachable as error:
        console().print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(EXIT_UNREACHABLE) from error
    except ApiError as error:
        _print_problem(error)
        busy = error.status in {429, 503}
        raise typer.Exit(EXIT_UNREACHABLE if busy else EXIT_USAGE) from error


def open_core() -> Sessions:
    """The database itself, for commands of whoever runs the server. Raises SetupError."""
    sessions = open_sessions(load_settings().database_url.get_secret_value(), pool_size=1)
    try:
        with sessions.begin() as session:
            session.execute(text("SELECT 1"))
    except OperationalError as error:
        raise SetupError(
            "the database at DARKROOM_DATABASE_URL cannot be reached: is the server up, and the "
            f"URL that of this server? ({error.orig})"
        ) from error
    return sessions


def _print_problem(error: ApiError) -> None:
    out = console()
    out.print(f"error: {error}", style="red", markup=False)
    problems = error.problem.get("errors") or []
    for problem in problems[:_PROBLEMS_SHOWN]:
        where = ".".join(str(part) for part in problem["loc"])
        out.print(f"  {where}: {problem['message']}", markup=False)
    if len(problems) > _PROBLEMS_SHOWN:
        out.print(f"  … and {len(problems) - _PROBLEMS_SHOWN} more")


def print_json(value: Json) -> None:
    """Results are JSON, coloured only for a terminal."""
    Console().print_json(data=value)
