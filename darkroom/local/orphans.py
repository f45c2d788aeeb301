"""Orphans of a killed launcher: recorded while they run, killed by the next launcher."""

import json
from collections.abc import Iterable
from pathlib import Path

import psutil

from darkroom.local.linux import boot_id, started_at
from darkroom.local.process import kill, wait_exited


def record(file: Path, processes: Iterable[psutil.Process]) -> None:
    """Write down each process with its start time: pids are reused."""
    started = {process.pid: started_at(process.pid) for process in processes}
    running = {pid: ticks for pid, ticks in started.items() if ticks is not None}
    fresh = file.with_name(file.name + ".new")
    fresh.write_text(json.dumps({"boot": boot_id(), "processes": running}))
    fresh.replace(file)


def kill_orphans(file: Path) -> int:
    """Kill what the last launcher left; return how many. Call it only under the lock."""
    found = recorded_processes(file)
    for process in found:
        kill(process)
    wait_exited(found, timeout_s=5)
    file.unlink(missing_ok=True)
    return len(found)


def recorded_processes(file: Path) -> list[psutil.Process]:
    """Return the recorded processes that still run, with their descendants."""
    try:
        saved = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):  # never started, or killed before the write
        return []
    if saved["boot"] != boot_id():
        return []
    found: dict[int, psutil.Process] = {}
    for pid, ticks in saved["processes"].items():
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
