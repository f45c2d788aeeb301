"""`darkroom submit` and `darkroom job`: one picture."""

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from darkroom.cli.follow import left
from darkroom.cli.session import EXIT_JOB_FAILED, EXIT_USAGE, api, console, print_json
from darkroom.client import download
from darkroom.client.http import Client
from darkroom.generation.image_codec import read_parameters
from darkroom.generation.params import GenerationParams, OutputFormat
from darkroom.status import FINISHED, Priority

Json = dict[str, Any]

app = typer.Typer(help="One job: look, wait, cancel, retry, delete.", no_args_is_help=True)
_WATCH_S: Final = 5  #: after which the place in the queue is told anew
JobId = Annotated[str, typer.Argument(metavar="JOB_ID")]


def submit(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep out.")] = None,
    model: Annotated[str | None, typer.Option(help="A model's name.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoise steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 turns it off.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same picture.")] = None,
    output_format: Annotated[
        OutputFormat | None, typer.Option("--format", help="File format.")
    ] = None,
    priority: Annotated[Priority | None, typer.Option(help="Default: normal.")] = None,
    start_within_s: Annotated[
        int | None, typer.Option(help="Seconds; not begun by then, it expires.")
    ] = None,
    deadline_s: Annotated[
        int | None, typer.Option(help="Seconds; not finished by then, it expires.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="To find the job again.")] = None,
    webhook_url: Annotated[
        str | None, typer.Option(help="Told when it ends; see `darkroom webhooks secret`.")
    ] = None,
    from_image: Annotated[
        Path | None,
        typer.Option(help="Start from the parameters inside a picture drawn here.", exists=True),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until it is drawn.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the picture; implies --wait.", file_okay=False)
    ] = None,
) -> None:
    """Submit one prompt."""
    wanted = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "model": model,
        "width": width,
        "height": height,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "seed": seed,
        "output_format": output_format,
        "priority": priority,
        "start_within_s": start_within_s,
        "deadline_s": deadline_s,
        "label": label,
        "webhook_url": webhook_url,
    }
    job = _parameters_of(from_image) | {key: v for key, v in wanted.items() if v is not None}
    if "prompt" not in job:
        console().print("error: give a prompt, or --from-image", style="red")
        raise typer.Exit(EXIT_USAGE)
    with api() as client:
        submitted = client.submit(job)
        if wait or out is not None:
            submitted = _until_finished(client, submitted)
        if out is not None:
            _save(client, submitted, out)
    print_json(submitted)
    _exit_for(submitted)


def _parameters_of(picture: Path | None) -> Json:
    if picture is None:
        return {}
    parameters = read_parameters(picture)
    if parameters is None:
        console().print(f"error: {picture} carries no parameters of Darkroom", style="red")
        raise typer.Exit(EXIT_USAGE)
    job = {key: parameters[key] for key in GenerationParams.model_fields if key in parameters}
    if "revision" in parameters:  # what that model draws today may look otherwise
        job["model"] = f"{job['model']}@{parameters['revision']}"
    return job


@app.command()
def show(job_id: JobId) -> None:
    """Print the job."""
    with api() as client:
        print_json(client.job(job_id))


@app.command()
def watch(job_id: JobId) -> None:
    """Wait until the job has ended, then print it."""
    with api() as client:
        job = _until_finished(client, client.job(job_id))
    print_json(job)
    _exit_for(job)


@app.command()
def cancel(job_id: JobId) -> None:
    """Withdraw the job: at once while it waits, within about a step while it is drawn."""
    with api() as client:
        print_json(client.cancel_job(job_id))


@app.command()
def retry(job_id: JobId) -> None:
    """Ask for the same again, after an end without a picture; prints the new job."""
    with api() as client:
        print_json(client.retry_job(job_id))


@app.command()
def delete(job_id: JobId) -> None:
    """Remove the picture and all that was written about it."""
    with api() as client:
        client.delete_job(job_id)
    console().print(f"deleted {job_id}", markup=False)


def _until_finished(client: Client, job: Json) -> Json:
    with console().status(_line(job)) as line:
        while job["status"] not in FINISHED:
            job = client.job(job["id"], wait=True, wait_s=_WATCH_S)
            line.update(_line(job))
    return job


def _line(job: Json) -> str:
    waits = job["queue"]
    if waits is None:
        return f"{job['id']} {job['status']}"
    place = "" if waits["position"] is None else f"number {waits['position']:,}"
    return ", ".join(filter(None, [f"{job['id']} queued", place, left(waits)]))


def _save(client: Client, job: Json, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    saved = download.download(client, [download.line_of(job)], folder, on_line=lambda: None)
    for picture in saved.shown:
        console().print(f"saved {picture.file}", markup=False)


def _exit_for(job: Json) -> None:
    if job["status"] in FINISHED - {"succeeded"}:
        raise typer.Exit(EXIT_JOB_FAILED)
