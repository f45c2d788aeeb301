"""Summaries of jobs, batches and the queue, as a person reads them on a terminal."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from darkroom.status import FINISHED, BatchOutcome, BatchStatus, Status

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Json = dict[str, Any]

_PROMPT_CHARS: Final = 72
_STYLES: Final[dict[str, str]] = {
    Status.SUCCEEDED: "green",
    BatchOutcome.ALL_SUCCEEDED: "green",
    Status.FAILED: "red",
    BatchOutcome.ALL_FAILED: "red",
    BatchOutcome.PARTIAL: "yellow",
    Status.EXPIRED: "yellow",
}


def job_summary(job: Json, *, files: Sequence[Path] = ()) -> "Table":
    """Return a job's status, input, seed, seconds, saved files, and the command to run next."""
    asked = job["input"]
    size = f"{asked['width']} x {asked['height']} pixels"
    return _facts(
        [
            ("job", job["id"]),
            ("status", job["status"]),
            ("error", job["error"] and f"{job['error']['code']}: {job['error']['message']}"),
            ("prompt", _shortened(asked["prompt"])),
            ("model", f"{job['model']}, {size}, {asked['num_inference_steps']} steps"),
            ("seed", str(asked["seed"])),
            ("time", _job_time(job)),
            ("saved", "\n".join(map(str, files))),
            ("next", None if files else _after_job(job)),
        ]
    )


def batch_summary(batch: Json, *, folder: Path | None = None) -> "Table":
    """Return a batch's status, its jobs by status, seconds, and the command to run next."""
    counts = batch["counts"]
    numbers = [f"{counts[name]:,} {name}" for name in Status if counts[name]]
    return _facts(
        [
            ("batch", batch["id"]),
            ("label", batch["label"]),
            ("status", batch["outcome"] or batch["status"]),
            ("jobs", ", ".join(numbers)),
            ("skipped", f"{counts['rejected']:,} rows" if counts["rejected"] else None),
            ("time", _batch_time(batch)),
            ("saved", None if folder is None else f"{folder}/"),
            ("next", _after_batch(batch, downloaded=folder is not None)),
        ]
    )


def queue_summary(queue: Json) -> "RenderableType":
    """Return the queued jobs by class and model, and the speed of the installation."""
    from rich.console import Group
    from rich.table import Table

    control = [state for state in ("paused", "draining") if queue[state]]
    line = (
        f"{queue['queued']:,} queued, {queue['paused_jobs']:,} paused, "
        f"{queue['microbatches_running']} microbatches running, "
        f"{queue['images_per_s']:.2f} images/s" + "".join(f"; {state}" for state in control)
    )
    table = Table("class", "model", "queued", "oldest")
    for depth in queue["depth"]:
        oldest = duration(depth["oldest_queued_s"])
        table.add_row(depth["priority"], depth["model"], f"{depth['jobs']:,}", oldest)
    return Group(table, line) if queue["depth"] else line


def fields_summary(result: Json) -> "Table":
    """Return each field of a flat result on a line of its own."""
    return _facts(
        (name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for name, value in result.items()
        if name not in {"object", "urls"} and value is not None
    )


def delivery_summary(delivery: Json) -> "Table":
    """Return what was sent to which endpoint, and how each attempt ended."""
    attempts = [f"{attempt['outcome']} at {attempt['at']}" for attempt in delivery["attempts"]]
    return _facts(
        [
            ("delivery", delivery["id"]),
            ("status", delivery["status"]),
            ("event", delivery["type"]),
            ("about", delivery["job_id"] or delivery["batch_id"]),
            ("attempts", "\n".join(attempts) or "none yet"),
        ]
    )


def eta(thing: Json) -> str:
    """Return the expected seconds of a batch or of a job's `queue`; empty if not known."""
    if thing["eta_s_p50"] is None:
        return ""
    return f"about {duration(thing['eta_s_p50'])}, within {duration(thing['eta_s_p90'])}"


def duration(seconds: float) -> str:
    """Return 8 s, 3 min or 2 h 10 min."""
    if seconds < 90:  # noqa: PLR2004  # below, seconds say more
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"  # noqa: PLR2004


def _facts(rows: Iterable[tuple[str, str | None]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        if value:
            style = _STYLES.get(value, "") if name == "status" else ""
            table.add_row(name, Text(value, style=style))
    return table


def _job_time(job: Json) -> str:
    if job["queue"] is not None:
        position = job["queue"]["position"]
        place = "" if position is None else f"number {position:,} in the queue"
        return ", ".join(filter(None, [place, eta(job["queue"])]))
    timings = job["timings"]
    measured = {"generating": timings["inference_ms"], "queued": timings["queued_ms"]}
    return ", ".join(f"{ms / 1000:.1f} s {name}" for name, ms in measured.items() if ms is not None)


def _after_job(job: Json) -> str | None:
    if job["status"] == Status.SUCCEEDED:
        return f"darkroom job watch {job['id']} --out FOLDER  (saves the image)"
    if job["status"] not in FINISHED:
        return f"darkroom job watch {job['id']}"
    retryable = job["error"] is None or job["error"]["retryable"]
    return f"darkroom job retry {job['id']}" if retryable else None


def _batch_time(batch: Json) -> str:
    if batch["finished_at"] is None:
        return eta(batch)
    created, finished = (
        datetime.fromisoformat(batch[name]) for name in ("created_at", "finished_at")
    )
    return f"finished {duration((finished - created).total_seconds())} after its submission"


def _after_batch(batch: Json, *, downloaded: bool) -> str | None:
    if batch["status"] == BatchStatus.PAUSED:
        return f"darkroom batch resume {batch['id']}"
    if batch["status"] in {BatchStatus.QUEUED, BatchStatus.RUNNING}:
        return f"darkroom batch watch {batch['id']}"
    verbs = ["download"] * bool(batch["counts"]["succeeded"] and not downloaded)
    verbs += ["retry"] * bool(batch["counts"]["failed"])
    return "\n".join(f"darkroom batch {verb} {batch['id']}" for verb in verbs)


def _shortened(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= _PROMPT_CHARS else line[: _PROMPT_CHARS - 1] + "…"
