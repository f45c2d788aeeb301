"""`darkroom queue` and `darkroom admin`: the whole installation."""

import sys
from itertools import islice
from typing import Annotated, Any

import typer
from rich.table import Table

from darkroom.cli.follow import duration
from darkroom.cli.session import EXIT_USAGE, api, console, print_json

Json = dict[str, Any]

app = typer.Typer(help="The whole installation; needs a key of scope admin.", no_args_is_help=True)


def queue() -> None:
    """How much waits, by class and model, and how fast it is drawn."""
    with api() as client:
        found = client.queue()
    _tell(found)
    if not sys.stdout.isatty():
        print_json(found)


def _tell(found: Json) -> None:
    table = Table("class", "model", "waiting", "oldest")
    for depth in found["depth"]:
        oldest = duration(depth["oldest_queued_s"])
        table.add_row(depth["priority"], depth["model"], f"{depth['jobs']:,}", oldest)
    out = console()
    out.print(table)
    orders = [order for order in ("paused", "draining") if found[order]]
    out.print(
        f"{found['queued']:,} queued, {found['paused_jobs']:,} paused, "
        f"{found['microbatches_running']} microbatches running, "
        f"{found['images_per_s']:.2f} images/s" + "".join(f"; {order}" for order in orders)
    )


@app.command()
def drain() -> None:
    """Accept nothing new; finish what is there."""
    with api() as client:
        print_json(client.order("drain"))


@app.command()
def pause() -> None:
    """Claim nothing; what waits stays, what runs is finished."""
    with api() as client:
        print_json(client.order("pause"))


@app.command()
def resume() -> None:
    """End a pause and a drain."""
    with api() as client:
        print_json(client.order("resume"))


@app.command()
def purge(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Cancel every job that waits, of all tenants."""
    with api() as client:
        snapshot = client.queue()
        jobs = snapshot["queued"] + snapshot["paused_jobs"]
        if not yes and not sys.stdin.isatty():
            console().print("error: say --yes to cancel all that waits", style="red")
            raise typer.Exit(EXIT_USAGE)
        if not yes:
            typer.confirm(f"Cancel all {jobs:,} jobs that wait?", abort=True, err=True)
        print_json(client.purge())


@app.command()
def failed(
    retry: Annotated[
        str | None, typer.Option(metavar="JOB_ID", help="Draw this one again.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 20,
) -> None:
    """List the jobs that failed, of all tenants, or retry one."""
    with api() as client:
        if retry is not None:
            print_json(client.retry_failed(retry))
            return
        for job in islice(client.failed(), limit):
            error = job["error"]
            print(f"{job['id']}  {job['tenant_id']}  {error['code']}  {error['message']}")
