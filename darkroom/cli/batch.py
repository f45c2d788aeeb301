"""`darkroom batch`: a file of prompts, and the pictures it becomes."""

import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from darkroom import gallery
from darkroom.batches import BatchOutcome, BatchStatus
from darkroom.cli.session import EXIT_JOB_FAILED, api, console, print_json
from darkroom.client import Client

Json = dict[str, Any]

_POLL_S: Final = 0.5

app = typer.Typer(help="Submit and follow batches.", no_args_is_help=True)
BatchId = Annotated[str, typer.Argument(metavar="BATCH_ID")]
Out = Annotated[Path, typer.Option(help="Folder for the pictures.", file_okay=False)]


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(help="A CSV file.", exists=True, dir_okay=False)],
    label: Annotated[str | None, typer.Option(help="To find the batch again.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until all of it is drawn.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; implies --wait.", file_okay=False)
    ] = None,
) -> None:
    """Submit a CSV file: all of its rows, or none and a list of what is wrong."""
    with api() as client:
        batch = client.submit_csv(file, label=label)
        if wait or out is not None:
            batch = _until_completed(client, batch)
        if out is not None:
            _download(client, batch["id"], out)
    print_json(batch)
    _exit_for(batch)


@app.command()
def show(batch_id: BatchId) -> None:
    """Print the batch."""
    with api() as client:
        print_json(client.batch(batch_id))


@app.command()
def watch(batch_id: BatchId) -> None:
    """Follow the batch until it is completed."""
    with api() as client:
        batch = _until_completed(client, client.batch(batch_id))
    print_json(batch)
    _exit_for(batch)


@app.command()
def download(batch_id: BatchId, out: Out = Path("darkroom-output")) -> None:
    """Fetch the pictures drawn so far, with a manifest and a contact sheet."""
    with api() as client:
        _download(client, batch_id, out)


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console(),
    )


def _until_completed(client: Client, batch: Json) -> Json:
    with _progress() as progress:
        task = progress.add_task("drawing", total=batch["counts"]["total"])
        while True:
            counts = batch["counts"]
            ended = counts["total"] - counts["queued"] - counts["running"]
            failed = f", {counts['failed']} failed" if counts["failed"] else ""
            progress.update(task, completed=ended, description=f"drawing{failed}")
            if batch["status"] == BatchStatus.COMPLETED:
                return batch
            time.sleep(_POLL_S)
            batch = client.batch(batch["id"])


def _download(client: Client, batch_id: str, folder: Path) -> None:
    total = client.batch(batch_id)["counts"]["total"]
    with _progress() as progress:
        task = progress.add_task("downloading", total=total)
        entries = gallery.download(
            client, client.batch_jobs(batch_id), folder, on_file=lambda: progress.advance(task)
        )
    sheet = folder / gallery.CONTACT_SHEET
    gallery.contact_sheet(entries, sheet)
    pictures = sum(entry.file is not None for entry in entries)
    console().print(f"{pictures} pictures in {folder}/", markup=False)
    console().print(f"  manifest       {folder / gallery.MANIFEST}", markup=False)
    console().print(f"  contact sheet  {sheet}", markup=False)


def _exit_for(batch: Json) -> None:
    completed = batch["status"] == BatchStatus.COMPLETED
    if completed and batch["outcome"] != BatchOutcome.ALL_SUCCEEDED:
        raise typer.Exit(EXIT_JOB_FAILED)
