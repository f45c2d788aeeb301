"""The data directory: where each thing lies, who may read it, and who holds it."""

import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from darkroom.errors import SetupError

#: Ray's Unix sockets add up to 62 bytes to its folder, and a socket's path ends at 107.
LONGEST_RAY_DIR: Final = 44


@dataclass(frozen=True)
class DataDir:
    """Paths below one data directory."""

    home: Path

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def secrets(self) -> Path:
        return self.home / "secrets"

    @property
    def ready(self) -> Path:
        return self.home / "ready"

    @property
    def objects(self) -> Path:
        return self.home / "objects"

    @property
    def lock(self) -> Path:
        return self.home / "lock"

    @property
    def processes(self) -> Path:
        return self.home / "processes.json"

    @property
    def ray(self) -> Path:
        """Below the data directory if its sockets fit there, else a private folder in /tmp."""
        inside = self.home / "ray"
        if len(os.fsencode(inside)) + len("/r") <= LONGEST_RAY_DIR:
            return inside
        digest = hashlib.sha256(os.fsencode(self.home)).hexdigest()[:12]
        return Path("/tmp") / f"darkroom-{os.geteuid()}-{digest}"  # noqa: S108  # private_dir guards it

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"


def make_data_dir(data_dir: Path) -> DataDir:
    """Make the folders, for their owner alone. Raises SetupError when they are somebody else's."""
    layout = DataDir(data_dir.resolve())
    layout.home.mkdir(parents=True, exist_ok=True)
    for folder in (layout.home, layout.logs, layout.secrets, layout.ready, layout.objects):
        private_dir(folder)
    return layout


def private_dir(path: Path) -> None:
    """Make it, or make sure that it is ours alone. Raises SetupError for another user's."""
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise SetupError(f"{path} belongs to somebody else. Remove it, or choose another folder.")
    path.chmod(0o700)


def secret(path: Path, *, otherwise: str | None = None) -> str:
    """The secret kept in this file, made up on the first day."""
    if otherwise is None and path.exists():
        return path.read_text()
    value = otherwise or secrets.token_urlsafe(32)
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    fresh.touch(mode=0o600, exist_ok=False)  # private before it says anything
    fresh.write_text(value)
    fresh.replace(path)
    return value


@contextmanager
def locked(layout: DataDir) -> Iterator[None]:
    """The data directory, for us alone. Raises SetupError that names who holds it."""
    with layout.lock.open("a+") as file:  # the lock goes when the process does, however it ends
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as taken:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise SetupError(
                f"{layout.home} is in use by the stack with process id {holder}. "
                f"Stop that one (`kill {holder}`), or give this one another --data-dir."
            ) from taken
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
