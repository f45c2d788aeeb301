"""`darkroom batch`: a file of prompts, and the pictures it becomes."""

import csv
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from darkroom.batches import BatchOutcome, BatchStatus
from darkroom.cli.follow import counting, until_ended
from darkroom.cli.session import EXIT_JOB_FAILED, EXIT_USAGE, api, console, print_json
from darkroom.client import download as image_download
from darkroom.client.http import Client
from darkroom.imports.expansion import Expand
from darkroom.imports.importer import OnError

Json = dict[str, Any]

app = typer.Typer(help="Submit and follow batches.", no_args_is_help=True)
BatchId = Annotated[str, typer.Argument(metavar="BATCH_ID")]
Out = Annotated[Path, typer.Option(help="Folder for the pictures.", file_okay=False)]
Label = Annotated[str | None, typer.Option(help="To find the batch again.")]
Wait = Annotated[bool, typer.Option("--wait", help="Until all of it is drawn.")]
WaitOut = Annotated[
    Path | None, typer.Option(help="Folder for the pictures; implies --wait.", file_okay=False)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would become of it.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before a sweep.")]


@app.command()
def submit(
    file: Annotated[
        Path, typer.Argument(help="CSV, JSON lines or JSON.", exists=True, dir_okay=False)
    ],
    label: Label = None,
    on_error: Annotated[
        OnError, typer.Option(help="What a bad row does: nothing is created, or the others run.")
    ] = OnError.REJECT,
    dry_run: DryRun = False,
    expand: Annotated[
        Expand | None,
        typer.Option(help="Rows are sweeps: {a|b} in prompts and 4|8 in numbers are choices."),
    ] = None,
    default: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="For all rows that say nothing else."),
    ] = None,
    retention_days: Annotated[
        int | None, typer.Option(help="Days after which pictures and prompts are deleted.")
    ] = None,
    webhook_url: Annotated[
        str | None, typer.Option(help="Told when the batch ends; see `darkroom webhooks secret`.")
    ] = None,
    yes: Yes = False,
    wait: Wait = False,
    out: WaitOut = None,
) -> None:
    """Submit a file of rows: all of them, or none and a list of what is wrong."""
    given = {
        "label": label,
        "expand": expand,
        "retention_days": retention_days,
        "webhook_url": webhook_url,
    }
    params = {name: str(value) for name, value in given.items() if value is not None}
    params |= {"on_error": on_error} | _defaults(default or [])
    _submit(file, params, dry_run=dry_run, yes=yes, wait=wait, out=out)


@app.command()
def sweep(
    prompt: Annotated[str, typer.Argument(help="With choices: 'a {red|green} {cat|dog}'.")],
    values: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="With choices: steps=4|8, seed=1|2|3."),
    ] = None,
    how: Annotated[
        Expand, typer.Option(help="Each choice with each, or in step.")
    ] = Expand.PRODUCT,
    label: Label = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    wait: Wait = False,
    out: WaitOut = None,
) -> None:
    """Submit every combination of a prompt's choices."""
    row = {"prompt": prompt} | _defaults(values or [])
    params = {"expand": str(how)} | ({} if label is None else {"label": label})
    with _one_row(row) as file:
        _submit(file, params, dry_run=dry_run, yes=yes, wait=wait, out=out)


@contextmanager
def _one_row(row: dict[str, str]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sweep.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([row.keys(), row.values()])
        yield path


def _defaults(given: list[str]) -> dict[str, str]:
    named = [each.partition("=") for each in given]
    wrong = [name for name, equals, _ in named if not (name and equals)]
    if wrong:
        console().print(f"error: --set wants NAME=VALUE, not {wrong[0]!r}", style="red")
        raise typer.Exit(EXIT_USAGE)
    return {name: value for name, _, value in named}


def _submit(
    file: Path, params: dict[str, str], *, dry_run: bool, yes: bool, wait: bool, out: Path | None
) -> None:
    with api() as client:
        if dry_run:
            _tell_dry_run(client.submit_file(file, params | {"dry_run": "true"}))
            return
        if "expand" in params:
            _confirm(client, file, params, yes=yes)
        batch = client.submit_file(file, params)
        _tell_rejected(batch)
        if wait or out is not None:
            batch = until_ended(client, batch)
        if out is not None:
            _download(client, batch["id"], out)
    print_json(batch)
    _exit_for(batch)


def _confirm(client: Client, file: Path, params: dict[str, str], *, yes: bool) -> None:
    """Say first how many jobs a sweep makes; a person is asked."""
    counts = client.submit_file(file, params | {"dry_run": "true"})["counts"]
    console().print(f"{counts['accepted']:,} rows make {counts['total']:,} jobs")
    if sys.stdin.isatty() and not yes:
        typer.confirm("Submit them?", abort=True, err=True)


def _tell_dry_run(found: Json) -> None:
    counts = found["counts"]
    out = console()
    out.print(
        f"{counts['rows']:,} rows: {counts['accepted']:,} good, {counts['rejected']:,} bad; "
        f"{counts['total']:,} images"
    )
    if found["eta_s_p50"] is not None:
        out.print(f"drawn in about {found['eta_s_p50']:,.0f} s")
    if found["errors"]:
        _print_errors(found)
    if not sys.stdout.isatty():
        print_json(found)
    if counts["rejected"]:
        raise typer.Exit(EXIT_USAGE)


def _print_errors(found: Json) -> None:
    table = Table("row", "column", "code", "what is wrong")
    for error in found["errors"]:
        row, *column = error["loc"][1:]
        table.add_row(str(row), ".".join(map(str, column)), error["code"], error["message"])
    console().print(table, markup=False)
    more = found["error_count"] - len(found["errors"])
    if more:
        console().print(f"… and {more:,} more")


def _tell_rejected(batch: Json) -> None:
    rejected = batch["counts"]["rejected"]
    if rejected:
        line = f"{rejected:,} rows were skipped; see: darkroom batch errors {batch['id']}"
        console().print(line, style="yellow", markup=False, soft_wrap=True)


@app.command()
def show(batch_id: BatchId) -> None:
    """Print the batch."""
    with api() as client:
        print_json(client.batch(batch_id))


@app.command()
def watch(batch_id: BatchId) -> None:
    """Follow the batch to its end."""
    with api() as client:
        batch = until_ended(client, client.batch(batch_id))
    print_json(batch)
    _exit_for(batch)


@app.command()
def cancel(batch_id: BatchId) -> None:
    """Draw no more of it; what is drawn stays."""
    with api() as client:
        print_json(client.change_batch(batch_id, "cancel"))


@app.command()
def pause(batch_id: BatchId) -> None:
    """Hold what is queued; what is running is finished."""
    with api() as client:
        print_json(client.change_batch(batch_id, "pause"))


@app.command()
def resume(batch_id: BatchId) -> None:
    """Go on with a paused batch."""
    with api() as client:
        print_json(client.change_batch(batch_id, "resume"))


@app.command()
def retry(batch_id: BatchId, wait: Wait = False, out: WaitOut = None) -> None:
    """Draw the failed jobs again, as a new batch."""
    with api() as client:
        batch = client.retry_batch(batch_id)
        if wait or out is not None:
            batch = until_ended(client, batch)
        if out is not None:
            _download(client, batch["id"], out)
    print_json(batch)
    _exit_for(batch)


@app.command()
def errors(
    batch_id: BatchId,
    out: Annotated[Path, typer.Option(help="The file to write.", dir_okay=False)] = Path(
        "errors.csv"
    ),
) -> None:
    """Fetch the rows that were skipped and why, to be mended and sent again."""
    with api() as client:
        client.save(f"/v1/batches/{batch_id}/errors.csv", out)
    console().print(f"saved {out}", markup=False)


@app.command()
def download(batch_id: BatchId, out: Out = Path("darkroom-output")) -> None:
    """Fetch the pictures drawn so far that are not there yet, a manifest and a contact sheet."""
    with api() as client:
        _download(client, batch_id, out)


def _download(client: Client, batch_id: str, folder: Path) -> None:
    total = client.batch(batch_id)["counts"]["total"]
    with counting("downloading", total) as tick:
        done = image_download.download_batch(client, batch_id, folder, on_line=tick)
    kept = f" ({done.kept} were there)" if done.kept else ""
    waiting = f", {done.waiting} jobs without one" if done.waiting else ""
    out = console()
    out.print(f"{done.pictures} pictures in {folder}/{kept}{waiting}", markup=False)
    out.print(f"  manifest       {folder / image_download.MANIFEST}", markup=False)
    out.print(f"  contact sheet  {folder / image_download.CONTACT_SHEET}", markup=False)


def _exit_for(batch: Json) -> None:
    """1 when it has ended and not all of it is there; a batch that goes on has not failed."""
    ended = batch["status"] in {BatchStatus.COMPLETED, BatchStatus.CANCELED}
    if ended and batch["outcome"] != BatchOutcome.ALL_SUCCEEDED:
        raise typer.Exit(EXIT_JOB_FAILED)
