"""Checks of this machine, made before the first process starts."""

import ctypes.util
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Final

import psutil

from darkroom.errors import SetupError
from darkroom.local.ports import LOOPBACK, free_port, is_free
from darkroom.local.postgres import program
from darkroom.local.servers import rclone_program, redis_program

MIN_DISK_BYTES: Final = 2 * 2**30
MIN_MEMORY_BYTES: Final = 3 * 2**30


def check_machine(data_dir: Path) -> None:
    """Check the platform, Python, programs and free space. Raises SetupError with the remedy."""
    _check_platform()
    _check_python()
    for find in (lambda: program("postgres"), redis_program, rclone_program):
        find()
    _check_space(data_dir)


def choose_port(wanted: int) -> int:
    """Return the wanted port, or a free one for 0. Raises SetupError if it is in use."""
    if wanted == 0:
        return free_port()
    if not is_free(wanted):
        raise SetupError(
            f"Port {wanted} on {LOOPBACK} is in use by another program (`ss -ltnp` shows which). "
            "Stop it, or choose another with --port; `--port 0` picks a free one."
        )
    return wanted


def _check_platform() -> None:
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        raise SetupError(
            f"The local stack runs on Linux x86-64; this is {system} {machine}. "
            "Use `docker compose up`, or a Linux machine."
        )


def _check_python() -> None:
    version = sys.version_info[:2]
    if version not in {(3, 11), (3, 12)}:
        raise SetupError(
            f"Python 3.11 or 3.12 is needed, and this is {version[0]}.{version[1]}. "
            "Create the virtual environment with one of those."
        )
    if not _has_shared_library():
        raise SetupError(
            f"Triton needs Python's shared library (libpython{version[0]}.{version[1]}.so), and "
            f"the Python at {sys.base_prefix} has none. Install it (Debian, Ubuntu: apt-get "
            f"install libpython{version[0]}.{version[1]}), or use a Python built with "
            "--enable-shared, as uv's are."
        )


def _has_shared_library() -> bool:
    folder = sysconfig.get_config_var("LIBDIR") or ""
    for variable in ("INSTSONAME", "LDLIBRARY"):
        name = sysconfig.get_config_var(variable) or ""
        if ".so" in name and (Path(folder) / name).exists():
            return True
    # Debian links Python statically; the shared library is a package of its own.
    return (
        ctypes.util.find_library(f"python{sys.version_info[0]}.{sys.version_info[1]}") is not None
    )


def _check_space(data_dir: Path) -> None:
    folder = data_dir.resolve()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise SetupError(f"{folder} cannot be written to. Choose another folder with --data-dir.")
    disk, memory = shutil.disk_usage(folder).free, psutil.virtual_memory().available
    if disk < MIN_DISK_BYTES:
        raise SetupError(_shortage(f"disk space at {folder}", disk, MIN_DISK_BYTES))
    if memory < MIN_MEMORY_BYTES:
        raise SetupError(_shortage("memory", memory, MIN_MEMORY_BYTES))


def _shortage(resource: str, free: int, minimum: int) -> str:
    return (
        f"{free / 2**30:.1f} GiB of {resource} are free; the stack needs {minimum / 2**30:.0f} GiB."
    )
