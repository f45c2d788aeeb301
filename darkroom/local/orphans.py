"""Processes of a launcher that was killed: recorded while they run, ended by its successor."""

import json
from collections.abc import Iterable
from pathlib import Path

import psutil

from darkroom.local.linux import boot_id, started_at
from darkroom.local.process import gone_within, kill


def record(file: Path, processes: Iterable[psutil.Process]) -> None:
    """A pid alone proves nothing; with its start time, in this boot, it is that process."""
    seen = {process.pid: started_at(process.pid) for process in processes}
    living = {pid: ticks for pid, ticks in seen.items() if ticks is not None}
    fresh = file.with_name(file.name + ".new")
    fresh.write_text(json.dumps({"boot": boot_id(), "processes": living}))
    fresh.replace(file)


def end_orphans(file: Path) -> int:
    """How many processes of the last launcher had to be ended. Call it only under the lock."""
    found = recorded(file)
    for process in found:
        kill(process)
    gone_within(found, 5)
    file.unlink(missing_ok=True)
    return len(found)


def recorded(file: Path) -> list[psutil.Process]:
    """Those that still run, with their descendants."""
    try:
        written = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):  # never started, or killed before the disk had it
        return []
    if written["boot"] != boot_id():
        return []
    found: dict[int, psutil.Process] = {}
    for pid, ticks in written["processes"].items():
        if started_at(int(pid)) == ticks:
            for process in _with_descendants(int(pid)):
                found[process.pid] = process
    return list(found.values())


def _with_descendants(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
