"""Connections to PostgreSQL, and migration of its schema.

`python -m darkroom.db.connection migrate` migrates; `--check` reports whether that is needed.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias, TypeVar

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, func, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from darkroom.db.locks import AdvisoryLock
from darkroom.settings import HOME, load_settings

Sessions: TypeAlias = sessionmaker[Session]

Result = TypeVar("Result")

_TRIES: Final = 3
_RETRYABLE_CODES: Final = frozenset({"40P01", "40001"})  # deadlock detected, serialization failure
# A lost peer is noticed in about 3 s instead of the kernel's 2 hours (a network partition left
# psycopg blocked forever), and no query or forgotten transaction holds locks for long. Statements
# rely on locks and conditions; with a stricter default isolation they would only fail.
_CONNECT_ARGS: Final = {
    "connect_timeout": 2,
    "keepalives_idle": 1,
    "keepalives_interval": 1,
    "keepalives_count": 3,
    "tcp_user_timeout": 3000,
    "options": "-c statement_timeout=15000 -c idle_in_transaction_session_timeout=5000"
    " -c default_transaction_isolation=read\\ committed",
}


def open_database(url: str, *, pool_size: int = 8) -> Engine:
    """Return an engine for `postgresql://…`, which connects when needed."""
    return create_engine(
        make_url(url).set(drivername="postgresql+psycopg"),
        pool_size=pool_size,
        max_overflow=4,
        pool_timeout=5,
        pool_pre_ping=True,
        connect_args=_CONNECT_ARGS,
    )


def open_sessions(url: str, *, pool_size: int = 8) -> Sessions:
    """Return sessions; `with sessions.begin() as session:` is one transaction."""
    return sessionmaker(open_database(url, pool_size=pool_size), expire_on_commit=False)


def use_repeatable_read(session: Session) -> None:
    """Let the transaction see one snapshot; call it before the first query."""
    session.connection(execution_options={"isolation_level": "REPEATABLE READ"})


def is_unavailable(error: DBAPIError) -> bool:
    """Return whether the server was unreachable or shutting down; a retry may succeed."""
    state = getattr(error.orig, "sqlstate", None)
    return error.connection_invalidated or state is None or state[:2] in {"08", "57", "53"}


def retry_on_serialization_failure(work: Callable[[], Result]) -> Result:
    """Run `work`, retrying after a deadlock or serialization failure; `work` may run twice."""
    for _ in range(_TRIES - 1):
        try:
            return work()
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) not in _RETRYABLE_CODES:
                raise
    return work()


def migrate(url: str) -> None:
    """Upgrade the schema to the newest revision; one process at a time."""
    engine = open_database(url, pool_size=1)
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(select(func.pg_advisory_xact_lock(AdvisoryLock.MIGRATE)))
        config = _alembic_config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    engine.dispose()


def is_migrated(url: str) -> bool:
    """Return whether the schema is at the newest revision of this code."""
    engine = open_database(url, pool_size=1)
    with engine.connect() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
    engine.dispose()
    return current == ScriptDirectory.from_config(_alembic_config()).get_current_head()


def _alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(HOME / "migrations"))
    config.set_main_option("path_separator", "os")
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of `python -m darkroom.db.connection`."""
    parser = argparse.ArgumentParser(
        prog="python -m darkroom.db.connection", description="Upgrade the database schema."
    )
    parser.add_argument("command", choices=["migrate"])
    parser.add_argument("--check", action="store_true", help="only report whether it is up to date")
    arguments = parser.parse_args(argv)
    url = load_settings().database_url.get_secret_value()
    if arguments.check:
        up_to_date = is_migrated(url)
        print("up to date" if up_to_date else "needs: python -m darkroom.db.connection migrate")
        return 0 if up_to_date else 1
    migrate(url)
    print("schema is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
