"""Connections have the isolation that our statements need, whatever the server's defaults."""

import psycopg
from sqlalchemy import text

from darkroom.db.connection import open_sessions, use_repeatable_read


def isolation(sessions, prepare=lambda _: None):
    with sessions.begin() as session:
        prepare(session)
        return session.scalar(text("SHOW transaction_isolation"))


def test_a_stricter_default_isolation_of_the_database_is_not_ours(database_url):
    name = database_url.rpartition("/")[2]
    with psycopg.connect(database_url, autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    sessions = open_sessions(database_url, pool_size=1)

    assert isolation(sessions) == "read committed"
    assert isolation(sessions, use_repeatable_read) == "repeatable read"
    assert isolation(sessions) == "read committed"
    sessions.kw["bind"].dispose()
