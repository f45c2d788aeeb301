"""Data directory of a local stack: its paths, their permissions, and its lock."""

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

#: Ray's Unix sockets add up to 62 bytes to its folder; a socket's path has at most 107.
MAX_RAY_DIR_BYTES: Final = 44


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
        """Ray's folder: below the data directory if its sockets fit there, else private in /tmp."""
        inside = self.home / "ray"
        if len(os.fsencode(inside)) + len("/r") <= MAX_RAY_DIR_BYTES:
            return inside
        digest = hashlib.sha256(os.fsencode(self.home)).hexdigest()[:12]
        return Path("/tmp") / f"darkroom-{os.geteuid()}-{digest}"  # noqa: S108  # private_dir guards it

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"


def make_data_dir(path: Path) -> DataDir:
    """Create the folders, for their owner only. Raises SetupError for another user's."""
    data_dir = DataDir(path.resolve())
    data_dir.home.mkdir(parents=True, exist_ok=True)
    for folder in (
        data_dir.home,
        data_dir.logs,
        data_dir.secrets,
        data_dir.ready,
        data_dir.objects,
    ):
        private_dir(folder)
    return data_dir


def private_dir(path: Path) -> None:
    """Create a folder for its owner only, or make it so. Raises SetupError for another user's."""
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise SetupError(f"{path} belongs to another user. Remove it, or choose another folder.")
    path.chmod(0o700)


def read_or_create_secret(path: Path) -> str:
    """Return the secret in this file; generate it if there is no file."""
    return path.read_text() if path.exists() else write_secret(path, secrets.token_urlsafe(32))


def write_secret(path: Path, value: str) -> str:
    """Write a secret that only its owner can read; return it."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    new.touch(mode=0o600, exist_ok=False)  # private before it has any content
    new.write_text(value)
    new.replace(path)
    return value


@contextmanager
def locked(data_dir: DataDir) -> Iterator[None]:
    """Lock the data directory. Raises SetupError that names the process holding the lock."""
    with data_dir.lock.open(
        "a+"
    ) as file:  # the kernel unlocks it when this process exits, however it does
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as taken:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise SetupError(
                f"{data_dir.home} is in use by the stack with process id {holder}. "
                f"Stop that one (`kill {holder}`), or give this one another --data-dir."
            ) from taken
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
