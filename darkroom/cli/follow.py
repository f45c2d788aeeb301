"""Progress of a batch on a terminal: jobs finished, rate, time left, failures."""

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

from darkroom.cli.session import console
from darkroom.cli.summaries import eta
from darkroom.client.http import Client, Unreachable
from darkroom.status import BatchStatus

Json = dict[str, Any]

_POLL_S: Final = 0.5
_UNREACHABLE_TIMEOUT_S: Final = 60.0  # a server that restarts is back by then


class _Rate(ProgressColumn):
    """Column that shows items per second."""

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
def progress_bar(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar during the block; yield what to call after each finished item."""
    with _progress() as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)


def until_finished(client: Client, batch: Json) -> Json:
    """Return the batch once no job of it is queued or running. Raises Unreachable after 60 s."""
    with _progress() as progress:
        task = progress.add_task("generating", total=batch["counts"]["total"])
        while True:
            counts = batch["counts"]
            unfinished = counts["queued"] + counts["running"]
            progress.update(
                task, completed=counts["total"] - unfinished, description=_description(batch)
            )
            if not unfinished:
                return batch
            time.sleep(_POLL_S)
            batch = _refreshed(client, batch["id"])


def _description(batch: Json) -> str:
    counts = batch["counts"]
    state = {
        BatchStatus.QUEUED: "queued",
        BatchStatus.PAUSED: "paused",
        BatchStatus.CANCELED: "canceled",
    }.get(batch["status"], "generating")
    losses = [
        f"{counts[name]} {name}" for name in ("failed", "canceled", "expired") if counts[name]
    ]
    return ", ".join(filter(None, [state, *losses, eta(batch)]))


def _refreshed(client: Client, batch_id: str) -> Json:
    """Ask for the batch again, waiting for a server that restarts meanwhile."""
    began = time.monotonic()
    while True:
        try:
            return client.batch(batch_id)
        except Unreachable:
            if time.monotonic() - began > _UNREACHABLE_TIMEOUT_S:
                raise
            time.sleep(_POLL_S)
