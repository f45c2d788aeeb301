"""One conversation with the API: its address, its errors as exit codes, its results as output."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from darkroom.errors import SetupError

if TYPE_CHECKING:  # each takes longer to import than `darkroom version` may run
    from rich.console import Console, RenderableType
    from sqlalchemy.orm import Session

    from darkroom.client.http import ApiError, Client

EXIT_OK: Final = 0
EXIT_JOB_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3
DEFAULT_API: Final = "http://127.0.0.1:8000"
_PROBLEMS_SHOWN: Final = 20

Json = dict[str, Any]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON. Default: only when the output is piped.")
]


def console() -> "Console":
    """Return a console on standard error, for progress and errors; results go to stdout."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_result(
    result: Json, summary: "Callable[[Json], RenderableType]", *, as_json: bool
) -> None:
    """Print a summary for a person at a terminal, JSON for everything else."""
    from rich.console import Console

    if wants_json(as_json=as_json):
        print_json(result)
    else:
        Console(highlight=False).print(summary(result))


def wants_json(*, as_json: bool) -> bool:
    """Return whether the result goes to a program: on request, or because it is piped."""
    return as_json or not sys.stdout.isatty()


def print_json(result: Json) -> None:
    """Print JSON, in colors on a terminal only."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console().print_json(data=result)
    else:  # not by rich: with FORCE_COLOR, as CI services set it, it would color what jq reads
        print(json.dumps(result, indent=2, ensure_ascii=False))


def fail(message: str) -> typer.Exit:
    """Print an error of usage; raise what this returns."""
    console().print(f"error: {message}", style="red", markup=False)
    return typer.Exit(EXIT_USAGE)


@contextmanager
def api() -> "Iterator[Client]":
    """Yield a client of DARKROOM_API; print its errors and exit with the code of each."""
    from darkroom.client.http import ApiError, Client, Unreachable

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


@contextmanager
def requires_extra(extra: str) -> Iterator[None]:
    """Import what only this extra installs. Raises SetupError that says how to get it."""
    try:
        yield
    except ModuleNotFoundError as missing:
        raise SetupError(
            f"this command needs the package {missing.name!r}: pip install 'darkroom[{extra}]'"
        ) from missing


@contextmanager
def database_session() -> "Iterator[Session]":
    """Yield a session on the database itself, committed after the block. Raises SetupError."""
    with requires_extra("server"):
        from sqlalchemy.exc import OperationalError

        from darkroom.db.connection import open_sessions
        from darkroom.settings import load_settings

    sessions = open_sessions(load_settings().database_url.get_secret_value(), pool_size=1)
    try:
        with sessions.begin() as session:
            yield session
    except OperationalError as error:
        raise SetupError(
            "the database at DARKROOM_DATABASE_URL cannot be reached: is the server up, and the "
            f"URL that of this server? ({error.orig})"
        ) from error
    finally:
        sessions.kw["bind"].dispose()


def _print_problem(error: "ApiError") -> None:
    out = console()
    out.print(f"error: {error}", style="red", markup=False)
    problems = error.problem.get("errors") or []
    for problem in problems[:_PROBLEMS_SHOWN]:
        where = ".".join(str(part) for part in problem["loc"])
        out.print(f"  {where}: {problem['message']}", markup=False)
    if len(problems) > _PROBLEMS_SHOWN:
        out.print(f"  … and {len(problems) - _PROBLEMS_SHOWN} more")
