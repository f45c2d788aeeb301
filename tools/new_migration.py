"""A new Alembic revision with the next number; no database is needed."""

import sys
from collections.abc import Sequence
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from darkroom.settings import HOME


def create_revision(message: str, folder: Path) -> Path:
    """Write an empty revision into the folder of migrations and return its path."""
    config = Config()
    config.set_main_option("script_location", str(folder))
    config.set_main_option("path_separator", "os")
    config.set_main_option("file_template", "%%(rev)s_%%(slug)s")
    head = ScriptDirectory.from_config(config).get_current_head()
    revision = f"{int(head or 0) + 1:04d}"
    command.revision(config, message, rev_id=revision)
    return next((folder / "versions").glob(f"{revision}_*.py"))


def main(arguments: Sequence[str]) -> int:
    create_revision(" ".join(arguments), HOME / "migrations")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
