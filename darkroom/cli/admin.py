"""`darkroom queue` and `darkroom admin`: the whole installation."""

import sys
from itertools import islice
from typing import Annotated, Any

import typer

from darkroom.cli.session import AsJson, api, fail, print_result
from darkroom.cli.summaries import fields_summary, job_summary, queue_summary

Json = dict[str, Any]

app = typer.Typer(
    help="Control the whole installation. Needs an API key with the scope admin.",
    no_args_is_help=True,
)


def queue(as_json: AsJson = False) -> None:
    """Show the queued jobs by class and model, and the images generated per second."""
    with api() as client:
        found = client.queue()
    print_result(found, queue_summary, as_json=as_json)


@app.command()
def drain(as_json: AsJson = False) -> None:
    """Reject new jobs with 503; generate those already accepted."""
    with api() as client:
        print_result(client.set_queue_control("drain"), fields_summary, as_json=as_json)


@app.command()
def pause(as_json: AsJson = False) -> None:
    """Claim no more jobs; queued jobs stay queued, running jobs finish."""
    with api() as client:
        print_result(client.set_queue_control("pause"), fields_summary, as_json=as_json)


@app.command()
def resume(as_json: AsJson = False) -> None:
    """End a pause and a drain."""
    with api() as client:
        print_result(client.set_queue_control("resume"), fields_summary, as_json=as_json)


@app.command()
def purge(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    as_json: AsJson = False,
) -> None:
    """Cancel every queued job of all tenants."""
    with api() as client:
        snapshot = client.queue()
        jobs = snapshot["queued"] + snapshot["paused_jobs"]
        if not yes and not sys.stdin.isatty():
            raise fail("purge cancels every queued job; without a terminal it needs --yes")
        if not yes:
            typer.confirm(f"Cancel all {jobs:,} queued jobs?", abort=True, err=True)
        print_result(client.purge(), fields_summary, as_json=as_json)


@app.command()
def failed(
    retry: Annotated[
        str | None, typer.Option(metavar="JOB_ID", help="Retry this job instead of listing.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of jobs to list, newest first.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List the failed jobs of all tenants, or retry one; --json applies to the retried job."""
    with api() as client:
        if retry is not None:
            print_result(client.retry_failed(retry), job_summary, as_json=as_json)
            return
        for job in islice(client.failed(), limit):
            error = job["error"]
            print(f"{job['id']}  {job['tenant_id']}  {error['code']}  {error['message']}")
