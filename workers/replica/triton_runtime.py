"""Triton on this machine: its files, its processes, its shared memory."""

import asyncio
import contextlib
import ctypes.util
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import uuid4

from darkroom.errors import SetupError

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108  # where Triton puts its regions
SHARED_MEMORY_BYTES: Final = 32 << 20  # 40 images of 512x512; it grows by as much when needed
STUB: Final = "triton_python_backend_stub"

#: Run between fork and exec, in a Python of its own: `preexec_fn` may deadlock with threads.
LAUNCHER: Final = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG: SIGKILL me when the thread that forked me ends
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that started Triton is dead")  # it died before the prctl
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class Bundle:
    """The Triton in the nvidia-pytriton wheel, and the libpython that its models need."""

    server: Path
    caches: Path
    libraries: Path
    backend_files: tuple[Path, ...]
    libpython: Path


def find_bundle() -> Bundle:
    """Find the bundle. Raises SetupError, which names what to install."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise SetupError(
            "Triton is not installed: pip install nvidia-pytriton, or use NVIDIA's image"
        )
    package = Path(spec.submodule_search_locations[0])
    triton = package / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = triton / "python_backend_stubs" / version / STUB
    if not stub.exists():
        raise SetupError(f"nvidia-pytriton has no Triton stub for Python {version}")
    backend = triton / "backends" / "python"
    return Bundle(
        server=triton / "bin" / "tritonserver",
        caches=triton / "caches",
        libraries=package.parent / "nvidia_pytriton.libs",
        backend_files=(
            backend / "libtriton_python.so",
            backend / "triton_python_backend_utils.py",
            stub,
        ),
        libpython=_libpython(version),
    )


def _libpython(version: str) -> Path:
    """Find the shared library that the stub is linked to; a static Python has none."""
    name = f"libpython{version}.so.1.0"
    folders = [
        Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib"),
        Path(sys.base_prefix, "lib"),
        Path("/usr/lib", sysconfig.get_config_var("MULTIARCH") or ""),
    ]
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    if ctypes.util.find_library(f"python{version}") == name:
        return Path(name)  # the loader finds it by itself
    raise SetupError(
        f"{name} is missing, and Triton's Python models need it: apt install libpython{version}, "
        "or a Python built with --enable-shared"
    )


def lay_out_backends(bundle: Bundle, folder: Path) -> Path:
    """Create and return Triton's backend folder, made of links, below `folder`."""
    python = folder / "backends" / "python"
    python.mkdir(parents=True)
    for file in bundle.backend_files:
        (python / file.name).symlink_to(file)
    return python.parent


def bundle_environment(bundle: Bundle, env: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment and `env`, with the paths that the bundle needs."""
    merged = {**os.environ, **env}
    libraries = [str(bundle.libraries), str(bundle.libpython.parent)]
    if inherited := merged.get("LD_LIBRARY_PATH"):
        libraries.append(inherited)
    merged["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
    # The stub takes its packages from the first python3 of the PATH: this interpreter.
    merged["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), merged.get("PATH", "")])
    return merged


def owned_prefix() -> str:
    """Return a prefix for one host's files and shared memory, which names their owner.

    The process id is this process's in its namespace: containers may share /dev/shm.
    """
    return f"darkroom-{_pid_namespace()}-{os.getpid()}-{uuid4().hex[:8]}"


def remove_leftovers(prefix: str | None = None) -> None:
    """Remove shared memory and folders of `prefix`, or of every host whose process is dead.

    A killed Triton leaves them, and they occupy memory. Those of other programs and of other
    process namespaces stay: this process cannot tell whether they are in use.
    """
    for folder in (SHARED_MEMORY, Path(tempfile.gettempdir())):
        for leftover in folder.glob(f"darkroom-{_pid_namespace()}-*"):
            owner = leftover.name.split("-")[2]
            is_own = prefix is not None and leftover.name.startswith(prefix)
            is_orphan = prefix is None and owner.isdigit() and not Path("/proc", owner).exists()
            if not (is_own or is_orphan):
                continue
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _pid_namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino


def stubs_of(parent: int) -> frozenset[int]:
    """Return the process ids of the python models that `parent`, a Triton, runs."""
    return frozenset(
        pid
        for pid, comm, state, ppid in _processes()
        # the kernel keeps 15 letters of a name; in process, dead children are not reaped
        if ppid == parent and STUB.startswith(comm) and state not in "ZX"
    )


def is_alive(pid: int, parent: int) -> bool:
    """Return whether `pid` is still a child of `parent`, and not dead."""
    status = _status(pid)
    return status is not None and status[2] == parent and status[1] not in "ZX"


def is_running(pid: int, parent: int) -> bool:
    """Return whether it is alive and not stopped."""
    status = _status(pid)
    return is_alive(pid, parent) and status is not None and status[1] not in "Tt"


def _processes() -> Iterator[tuple[int, str, str, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (status := _status(int(entry.name))):
            yield int(entry.name), *status


def _status(pid: int) -> tuple[str, str, int] | None:
    """Return name, state and parent, from proc_pid_stat(5); None for an unknown process."""
    try:
        line = Path("/proc", str(pid), "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    name, _, rest = line.partition("(")[2].rpartition(")")  # a name may hold brackets and spaces
    state, parent = rest.split()[:2]
    return name, state, int(parent)


def has_exited(process: subprocess.Popen[bytes]) -> bool:
    """Check without reaping it: until then, its process id is not reused."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


async def end_process(process: subprocess.Popen[bytes], *, grace_s: float) -> None:
    """Terminate a group leader and wait up to `grace_s`, then kill the rest of its group."""
    if not has_exited(process):
        os.kill(process.pid, signal.SIGTERM)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + grace_s
    while not has_exited(process) and loop.time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # also models that outlived their server
    await asyncio.to_thread(process.wait)
