"""Whether what a process needs can be reached, said in one line each."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeAlias

from redis import Redis
from sqlalchemy import text

from darkroom.db.connection import Sessions, open_sessions
from darkroom.redis_client import open_redis
from darkroom.settings import Settings
from darkroom.storage.images import ImageStore, S3Store

Check: TypeAlias = Callable[[], object]  #: returns when all is well, raises otherwise

OK: Final = "ok"


def run_checks(checks: Mapping[str, Check]) -> dict[str, str]:
    """`ok` or the kind of error for each check, side by side; addresses and keys stay out."""
    with ThreadPoolExecutor(max(1, len(checks))) as threads:
        return dict(zip(checks, threads.map(_run, checks.values()), strict=True))


def _run(check: Check) -> str:
    try:
        check()
    except Exception as error:  # noqa: BLE001  # whatever it is, it is the answer
        return f"unavailable ({type(error).__name__})"
    return OK


def database_check(sessions: Sessions) -> Check:
    """Whether it answers, and its schema is there."""

    def check() -> None:
        with sessions.begin() as session:
            session.execute(text("SELECT count(*) FROM tenant"))

    return check


def server_checks(sessions: Sessions, redis: Redis, store: ImageStore) -> dict[str, Check]:
    """The three servers that most processes of ours talk to."""
    return {"database": database_check(sessions), "redis": redis.ping, "storage": store.check}


def print_checks(settings: Settings, extra: Mapping[str, Check] | None = None) -> int:
    """What `--check` of our commands does: a line each, and 1 if anything is amiss."""
    sessions = open_sessions(settings.database_url.get_secret_value(), pool_size=1)
    checks = server_checks(sessions, open_redis(settings), S3Store(settings)) | dict(extra or {})
    return print_results(run_checks(checks))


def print_results(results: Mapping[str, str]) -> int:
    """A line each, and 1 if anything is amiss."""
    for name, result in results.items():
        print(f"{name}: {result}")
    return 0 if all(result == OK for result in results.values()) else 1
