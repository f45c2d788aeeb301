"""docker-compose.yml, Dockerfile and .dockerignore, read for tests."""

import fnmatch
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from darkroom.settings import HOME

COMPOSE = HOME / "docker-compose.yml"
OVERRIDE = HOME / "deploy" / "compose" / "publish-s3.yml"
MAKE_SECRETS = HOME / "deploy" / "compose" / "make-secrets.sh"


def command_of(argv: Sequence[str]) -> str | None:
    """Return `m` of `python … -m m …`, or `workers COMMAND`; None for other programs."""
    if "python" not in Path(argv[0]).name or "-m" not in argv:
        return None
    module, *rest = argv[argv.index("-m") + 1 :]
    return f"workers {rest[0]}" if module == "workers" else module


def our_commands(services: Mapping[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Return the command of each service that runs a Python module."""
    return {
        name: service["command"]
        for name, service in services.items()
        if command_of(service.get("command", ["image's own"]))
    }


def dockerfile_lines() -> list[str]:
    """Return the instructions of the Dockerfile, each on one line."""
    text = re.sub(r"\\\n", " ", (HOME / "Dockerfile").read_text())
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def sent_to_builder(path: str) -> bool:
    """Return whether .dockerignore lets the file pass; the last matching line decides."""
    ignored = False
    parts = path.split("/")
    prefixes = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    for line in (HOME / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if not line or line.startswith("#"):
            continue
        tried = parts if "**/" in line else prefixes
        if any(fnmatch.fnmatchcase(name, pattern) for name in tried):
            ignored = not line.startswith("!")
    return not ignored


def tracked_files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=HOME, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no git checkout")
    return listed.stdout.splitlines()
