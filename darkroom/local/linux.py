"""Linux system calls with which a parent leaves no process behind."""

import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36
CLONE_NEWUSER: Final = 0x1000_0000
NAMESPACE_UID: Final = 1000  #: of root, inside the user namespace of `leave_root`


def become_subreaper() -> None:
    """Make this process the parent of every descendant whose own parent died."""
    _check(_libc().prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def before_exec(*, death_signal: signal.Signals, leave_root: bool) -> Callable[[], None]:
    """Return what a child runs between fork and exec: it asks for a signal when its parent dies.

    The kernel watches the *thread* that forked, so launch children from the main thread.
    """
    libc = _libc()  # loaded here: between fork and exec nothing may take the loader's lock
    parent = os.getpid()

    def prepare() -> None:
        if leave_root:
            _enter_user_namespace(libc)
        _check(libc.prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0))
        if os.getppid() != parent:  # it died before prctl
            os.kill(os.getpid(), signal.SIGKILL)

    return prepare


def _enter_user_namespace(libc: ctypes.CDLL) -> None:
    """Become an ordinary user in a namespace of our own, in which files of root are ours."""
    uid, gid = os.geteuid(), os.getegid()
    _check(libc.unshare(CLONE_NEWUSER))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{NAMESPACE_UID} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{NAMESPACE_UID} {gid} 1")


def started_at(pid: int) -> int | None:
    """Return the clock ticks from boot to the start of a process: unique together with its pid."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    after_name = stat.rpartition(")")[2].split()  # a name may hold spaces and parentheses
    state, start_ticks = after_name[0], after_name[19]
    return None if state in "ZX" else int(start_ticks)


def boot_id() -> str:
    """Return an id that changes with each boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
