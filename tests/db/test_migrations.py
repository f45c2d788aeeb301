"""Migrations and tables agree."""

from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import CheckConstraint, text

from darkroom.db import webhook_tables  # noqa: F401  # its tables belong to the same metadata
from darkroom.db.connection import is_migrated, migrate, open_database
from darkroom.db.tables import Base


def test_the_migrated_schema_is_the_one_the_code_expects(database_url):
    engine = open_database(database_url)
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), Base.metadata)
        checks = connection.scalars(
            text("SELECT conname FROM pg_constraint WHERE contype = 'c' AND conname LIKE 'job%'")
        ).all()
    engine.dispose()

    assert differences == []
    expected = [
        c for c in Base.metadata.tables["job"].constraints if isinstance(c, CheckConstraint)
    ]
    assert len(checks) == len(expected)


def test_migrating_twice_changes_nothing(empty_database_url):
    assert not is_migrated(empty_database_url)
    migrate(empty_database_url)
    migrate(empty_database_url)
    assert is_migrated(empty_database_url)
