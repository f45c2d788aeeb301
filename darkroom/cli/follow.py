"""Progress of a batch on a terminal: how many, how fast, how much longer, what failed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from darkroom.batches import BatchStatus
from darkroom.cli.session import console
from darkroom.client.http import Client, Unreachable

Json = dict[str, Any]

_POLL_S: Final = 0.5
_PATIENCE_S: Final = 60.0  # with a server that has gone away in the middle


class _Rate(ProgressColumn):
    """How many a second."""

    def render(self, task: Task) -> Text:
        return Text(
            "" if task.speed is None else f"{task.speed:.1f}/s", style="progress.data.speed"
        )


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console(),
        speed_estimate_period=120,
    )


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar for the length of the block; call what it gives for each thing done."""
    with _progress() as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


def until_ended(client: Client, batch: Json) -> Json:
    """The batch once nothing of it is queued or running. Raises Unreachable after a minute."""
    with _progress() as progress:
        task = progress.add_task("drawing", total=batch["counts"]["total"])
        while True:
            counts = batch["counts"]
            open_jobs = counts["queued"] + counts["running"]
            progress.update(
                task, completed=counts["total"] - open_jobs, description=_described(batch)
            )
            if not open_jobs:
                return batch
            time.sleep(_POLL_S)
            batch = _again(client, batch["id"])


def _described(batch: Json) -> str:
    counts = batch["counts"]
    said = {
        BatchStatus.QUEUED: "waiting",
        BatchStatus.PAUSED: "paused",
        BatchStatus.CANCELED: "canceled",
    }.get(batch["status"], "drawing")
    ends = [f"{counts[end]} {end}" for end in ("failed", "canceled", "expired") if counts[end]]
    return ", ".join(filter(None, [said, *ends, left(batch)]))


def duration(seconds: float) -> str:
    """As people say it: 8 s, 3 min, 2 h 10 min."""
    if seconds < 90:  # noqa: PLR2004  # until then seconds tell more
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"  # noqa: PLR2004


def left(thing: Json) -> str:
    """About how long it will take still, if that is known; of a job's `queue`, or a batch."""
    if thing["eta_s_p50"] is None:
        return ""
    return f"about {duration(thing['eta_s_p50'])}, within {duration(thing['eta_s_p90'])}"


def _again(client: Client, batch_id: str) -> Json:
    """The batch; a server that is started anew meanwhile is waited for."""
    began = time.monotonic()
    while True:
        try:
            return client.batch(batch_id)
        except Unreachable:
            if time.monotonic() - began > _PATIENCE_S:
                raise
            time.sleep(_POLL_S)
