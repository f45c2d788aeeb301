"""Alembic's entry point; runs on the connection of `darkroom.db.connection.migrate`."""

from alembic import context

from darkroom.db import webhook_tables  # noqa: F401  # its tables belong to the same metadata
from darkroom.db.tables import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
context.run_migrations()
