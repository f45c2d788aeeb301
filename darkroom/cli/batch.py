"""`darkroom batch`: a file of rows, and the images generated from it."""

import csv
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from darkroom.cli.session import (
    EXIT_JOB_FAILED,
    EXIT_USAGE,
    AsJson,
    api,
    console,
    fail,
    print_json,
    print_result,
    wants_json,
)
from darkroom.cli.summaries import batch_summary, eta
from darkroom.status import BatchOutcome, BatchStatus, Expand, OnError

if TYPE_CHECKING:
    from darkroom.client.download import DownloadSummary
    from darkroom.client.http import Client

Json = dict[str, Any]

_IMAGES_LISTED: Final = 5

app = typer.Typer(help="Submit, follow, change and download batches.", no_args_is_help=True)
BatchId = Annotated[str, typer.Argument(metavar="BATCH_ID")]
Out = Annotated[Path, typer.Option(help="Folder for the images.", file_okay=False)]
Label = Annotated[
    str | None, typer.Option(help="Your own label, returned with the batch and its jobs.")
]
Wait = Annotated[bool, typer.Option("--wait", help="Wait until every job has finished.")]
WaitOut = Annotated[
    Path | None,
    typer.Option(help="Folder for the images; implies --wait. Default: none.", file_okay=False),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Validate and count; create nothing.")]
Yes = Annotated[
    bool, typer.Option("--yes", "-y", help="Do not ask before an expansion is submitted.")
]


@app.command()
def submit(
    file: Annotated[
        Path, typer.Argument(help="CSV, JSON lines or JSON.", exists=True, dir_okay=False)
    ],
    label: Label = None,
    on_error: Annotated[
        OnError,
        typer.Option(help="For an invalid row: reject the whole file, or skip the row."),
    ] = OnError.REJECT,
    dry_run: DryRun = False,
    expand: Annotated[
        Expand | None,
        typer.Option(
            help="Expand choices: {a|b} in prompts, 4|8 in numbers. product: every combination; "
            "zip: the first with the first. Default: no expansion."
        ),
    ] = None,
    default: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Value of a column for rows that leave it empty. Repeatable.",
        ),
    ] = None,
    retention_days: Annotated[
        int | None,
        typer.Option(
            help="Days after which images and prompts are deleted. Default: the tenant's setting."
        ),
    ] = None,
    webhook_url: Annotated[
        str | None,
        typer.Option(
            help="URL that receives a webhook when the batch finishes; "
            "`darkroom webhooks secret` verifies it. Default: none."
        ),
    ] = None,
    yes: Yes = False,
    wait: Wait = False,
    out: WaitOut = None,
    as_json: AsJson = False,
) -> None:
    """Submit a file of rows as one batch, or list what is wrong with it."""
    options = {
        "label": label,
        "expand": expand,
        "retention_days": retention_days,
        "webhook_url": webhook_url,
    }
    params = {name: str(value) for name, value in options.items() if value is not None}
    params |= {"on_error": on_error} | _assignments(default or [])
    _submit(file, params, dry_run=dry_run, yes=yes, wait=wait, out=out, as_json=as_json)


@app.command()
def sweep(
    prompt: Annotated[str, typer.Argument(help="With choices: 'a {red|green} {cat|dog}'.")],
    values: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A column, with choices: steps=4|8, seed=1|2|3. Repeatable.",
        ),
    ] = None,
    how: Annotated[
        Expand,
        typer.Option(help="product: every combination; zip: the first with the first."),
    ] = Expand.PRODUCT,
    label: Label = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    wait: Wait = False,
    out: WaitOut = None,
    as_json: AsJson = False,
) -> None:
    """Submit every combination of a prompt's choices as one batch."""
    row = {"prompt": prompt} | _assignments(values or [])
    params = {"expand": str(how)} | ({} if label is None else {"label": label})
    with _file_of(row) as file:
        _submit(file, params, dry_run=dry_run, yes=yes, wait=wait, out=out, as_json=as_json)


@contextmanager
def _file_of(row: dict[str, str]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sweep.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([row.keys(), row.values()])
        yield path


def _assignments(options: list[str]) -> dict[str, str]:
    parts = [option.partition("=") for option in options]
    invalid = [name for name, equals, _ in parts if not (name and equals)]
    if invalid:
        raise fail(f"--set needs NAME=VALUE, not {invalid[0]!r}")
    return {name: value for name, _, value in parts}


def _submit(
    file: Path,
    params: dict[str, str],
    *,
    dry_run: bool,
    yes: bool,
    wait: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    with api() as client:
        if dry_run:
            found = client.submit_file(file, params | {"dry_run": "true"})
            _print_dry_run(found, as_json=as_json)
            return
        if "expand" in params:
            _confirm(client, file, params, yes=yes)
        batch = client.submit_file(file, params)
        _print_skipped(batch)
        _finish(client, batch, wait=wait, out=out, as_json=as_json)


def _finish(client: "Client", batch: Json, *, wait: bool, out: Path | None, as_json: bool) -> None:
    """Wait for the batch and download it, as far as asked; print it and exit by its outcome."""
    if wait or out is not None:
        batch = _until_finished(client, batch)
    if out is not None:
        _download(client, batch["id"], out)
    print_result(batch, partial(batch_summary, folder=out), as_json=as_json)
    _exit_for(batch)


def _until_finished(client: "Client", batch: Json) -> Json:
    from darkroom.cli.follow import until_finished

    return until_finished(client, batch)


def _confirm(client: "Client", file: Path, params: dict[str, str], *, yes: bool) -> None:
    """Print how many jobs an expansion makes; ask a person to confirm."""
    counts = client.submit_file(file, params | {"dry_run": "true"})["counts"]
    console().print(f"{counts['accepted']:,} rows make {counts['total']:,} jobs")
    if sys.stdin.isatty() and not yes:
        typer.confirm("Submit them?", abort=True, err=True)


def _print_dry_run(found: Json, *, as_json: bool) -> None:
    counts = found["counts"]
    out = console()
    out.print(
        f"{counts['rows']:,} rows: {counts['accepted']:,} valid, {counts['rejected']:,} invalid; "
        f"{counts['total']:,} images"
    )
    if time := eta(found):
        out.print(f"finished in {time}")
    if found["errors"]:
        _print_errors(found)
    if wants_json(as_json=as_json):
        print_json(found)
    if counts["rejected"]:
        raise typer.Exit(EXIT_USAGE)


def _print_errors(found: Json) -> None:
    from rich.table import Table

    table = Table("row", "column", "code", "problem")
    for error in found["errors"]:
        row, *column = error["loc"][1:]
        table.add_row(str(row), ".".join(map(str, column)), error["code"], error["message"])
    console().print(table, markup=False)
    more = found["error_count"] - len(found["errors"])
    if more:
        console().print(f"… and {more:,} more")


def _print_skipped(batch: Json) -> None:
    rejected = batch["counts"]["rejected"]
    if rejected:
        line = f"{rejected:,} rows were skipped; see: darkroom batch errors {batch['id']}"
        console().print(line, style="yellow", markup=False, soft_wrap=True)


@app.command()
def show(batch_id: BatchId, as_json: AsJson = False) -> None:
    """Show a batch: its status, its jobs by status, and the time left."""
    with api() as client:
        print_result(client.batch(batch_id), batch_summary, as_json=as_json)


@app.command()
def watch(batch_id: BatchId, as_json: AsJson = False) -> None:
    """Wait until every job of a batch has finished; exit code 1 unless all succeeded."""
    with api() as client:
        _finish(client, client.batch(batch_id), wait=True, out=None, as_json=as_json)


@app.command()
def cancel(batch_id: BatchId, as_json: AsJson = False) -> None:
    """Cancel the unfinished jobs of a batch; generated images stay."""
    _change(batch_id, "cancel", as_json=as_json)


@app.command()
def pause(batch_id: BatchId, as_json: AsJson = False) -> None:
    """Pause the queued jobs of a batch; running jobs finish."""
    _change(batch_id, "pause", as_json=as_json)


@app.command()
def resume(batch_id: BatchId, as_json: AsJson = False) -> None:
    """Resume a paused batch."""
    _change(batch_id, "resume", as_json=as_json)


def _change(batch_id: str, verb: Literal["cancel", "pause", "resume"], *, as_json: bool) -> None:
    with api() as client:
        print_result(client.change_batch(batch_id, verb), batch_summary, as_json=as_json)


@app.command()
def retry(
    batch_id: BatchId, wait: Wait = False, out: WaitOut = None, as_json: AsJson = False
) -> None:
    """Submit the failed jobs of a batch again, as a new batch."""
    with api() as client:
        _finish(client, client.retry_batch(batch_id), wait=wait, out=out, as_json=as_json)


@app.command()
def errors(
    batch_id: BatchId,
    out: Annotated[Path, typer.Option(help="CSV file to write.", dir_okay=False)] = Path(
        "errors.csv"
    ),
) -> None:
    """Save the skipped rows with their errors, to correct and submit again."""
    with api() as client:
        client.save(f"/v1/batches/{batch_id}/errors.csv", out)
    console().print(f"saved {out}", markup=False)


@app.command()
def download(batch_id: BatchId, out: Out = Path("darkroom-output")) -> None:
    """Download the images generated so far, a manifest and a contact sheet."""
    with api() as client:
        _download(client, batch_id, out)


def _download(client: "Client", batch_id: str, folder: Path) -> None:
    from darkroom.cli.follow import progress_bar
    from darkroom.client import download

    total = client.batch(batch_id)["counts"]["total"]
    with progress_bar("downloading", total) as advance:
        summary = download.download_batch(client, batch_id, folder, on_line=advance)
    kept = f" ({summary.kept} already there)" if summary.kept else ""
    missing = f", {summary.missing} jobs without an image" if summary.missing else ""
    out = console()
    out.print(f"{summary.saved} images in {folder}/{kept}{missing}", markup=False)
    for line in _first_images(summary):
        out.print(f"  {line}", markup=False)
    out.print(f"  manifest       {folder / download.MANIFEST}", markup=False)
    out.print(f"  contact sheet  {folder / download.CONTACT_SHEET}", markup=False)


def _first_images(summary: "DownloadSummary") -> list[str]:
    listed = summary.images[:_IMAGES_LISTED]
    lines = [f"{image.file.name}  seed {image.parameters['seed']}" for image in listed]
    more = summary.saved - len(listed)
    return [*lines, f"… and {more:,} more"] if more else lines


def _exit_for(batch: Json) -> None:
    """Exit with 1 if the batch has finished without every image; not while it is unfinished."""
    finished = batch["status"] in {BatchStatus.COMPLETED, BatchStatus.CANCELED}
    if finished and batch["outcome"] != BatchOutcome.ALL_SUCCEEDED:
        raise typer.Exit(EXIT_JOB_FAILED)
