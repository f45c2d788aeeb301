"""Health checks of the servers that a process needs."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeAlias

from redis import Redis
from sqlalchemy import text

from darkroom.db.connection import Sessions, open_sessions
from darkroom.redis_client import open_redis
from darkroom.settings import Settings
from darkroom.storage.images import ImageStore, S3Store

Check: TypeAlias = Callable[[], object]  #: raises if the server is unavailable

OK: Final = "ok"


def run_checks(checks: Mapping[str, Check]) -> dict[str, str]:
    """Run the checks in parallel; return `ok` or the error's class, without addresses or keys."""
    with ThreadPoolExecutor(max(1, len(checks))) as threads:
        return dict(zip(checks, threads.map(_run, checks.values()), strict=True))


def _run(check: Check) -> str:
    try:
        check()
    except Exception as error:  # noqa: BLE001  # any error is the result
        return f"unavailable ({type(error).__name__})"
    return OK


def database_check(sessions: Sessions) -> Check:
    """Return a check that the database answers and has its schema."""

    def check() -> None:
        with sessions.begin() as session:
            session.execute(text("SELECT count(*) FROM tenant"))

    return check


def server_checks(sessions: Sessions, redis: Redis, store: ImageStore) -> dict[str, Check]:
    """Return checks of PostgreSQL, Redis and the image store."""
    return {"database": database_check(sessions), "redis": redis.ping, "storage": store.check}


def print_checks(settings: Settings, extra: Mapping[str, Check] | None = None) -> int:
    """Run the checks of a command's `--check` and print them; return its exit code."""
    sessions = open_sessions(settings.database_url.get_secret_value(), pool_size=1)
    checks = server_checks(sessions, open_redis(settings), S3Store(settings)) | dict(extra or {})
    return print_results(run_checks(checks))


def print_results(results: Mapping[str, str]) -> int:
    """Print one line per result; return 1 if any check failed, else 0."""
    for name, result in results.items():
        print(f"{name}: {result}")
    return 0 if all(result == OK for result in results.values()) else 1
