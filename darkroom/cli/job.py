"""`darkroom submit` and `darkroom job`: one image."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from darkroom.cli.session import EXIT_JOB_FAILED, AsJson, api, console, fail, print_result
from darkroom.cli.summaries import eta, job_summary
from darkroom.status import FINISHED, OutputFormat, Priority, Status

if TYPE_CHECKING:
    from darkroom.client.http import Client

Json = dict[str, Any]

app = typer.Typer(
    help="Show, wait for, cancel, retry and delete single jobs.", no_args_is_help=True
)
_WATCH_S: Final = 5  #: between two updates of the position in the queue
#: The fields that `--from-image` takes from a file: anyone may have written the others into it.
GENERATION_FIELDS: Final = (
    *("prompt", "negative_prompt", "model", "width", "height"),
    *("num_inference_steps", "guidance_scale", "seed", "output_format"),
)
JobId = Annotated[str, typer.Argument(metavar="JOB_ID")]
WaitOut = Annotated[
    Path | None,
    typer.Option(help="Folder for the image; implies --wait. Default: none.", file_okay=False),
]


def submit(
    prompt: Annotated[
        str | None, typer.Argument(help="What the image shows, 1 to 2000 characters.")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What the image must not show. Default: nothing.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="NAME or NAME@REVISION. Default: the server's.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. Default: the model's.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. Default: the model's.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Number of denoise steps. Default: the model's.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Guidance scale; 1 turns it off. Default: the model's."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="The same seed and parameters give the same image. Default: random."),
    ] = None,
    output_format: Annotated[
        OutputFormat | None, typer.Option("--format", help="File format. Default: png.")
    ] = None,
    priority: Annotated[Priority | None, typer.Option(help="Default: normal.")] = None,
    start_within_s: Annotated[
        int | None,
        typer.Option(
            help="Seconds by which generation must start, or the job expires. Default: no limit."
        ),
    ] = None,
    deadline_s: Annotated[
        int | None,
        typer.Option(
            help="Seconds by which the job must finish, or it expires. Default: no limit."
        ),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Your own label, returned with the job.")
    ] = None,
    webhook_url: Annotated[
        str | None,
        typer.Option(
            help="URL that receives a webhook when the job finishes; "
            "`darkroom webhooks secret` verifies it. Default: none."
        ),
    ] = None,
    from_image: Annotated[
        Path | None,
        typer.Option(help="Image made by Darkroom whose parameters are the defaults.", exists=True),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the job has finished.")] = False,
    out: WaitOut = None,
    as_json: AsJson = False,
) -> None:
    """Submit one prompt as a job."""
    options = {
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
    job = _parameters_of(from_image) | {key: v for key, v in options.items() if v is not None}
    if "prompt" not in job:
        raise fail("give a prompt, or --from-image")
    with api() as client:
        _finish(client, client.submit(job), wait=wait, out=out, as_json=as_json)


def _parameters_of(image: Path | None) -> Json:
    if image is None:
        return {}
    from darkroom.generation.image_codec import read_parameters

    parameters = read_parameters(image)
    if parameters is None:
        raise fail(f"{image} carries no parameters of Darkroom")
    job: Json = {name: parameters[name] for name in GENERATION_FIELDS if name in parameters}
    if "revision" in parameters:  # another revision of the model may generate another image
        job["model"] = f"{job['model']}@{parameters['revision']}"
    return job


@app.command()
def show(job_id: JobId, as_json: AsJson = False) -> None:
    """Show a job: its status, seed, and the time taken or left."""
    with api() as client:
        print_result(client.job(job_id), job_summary, as_json=as_json)


@app.command()
def watch(
    job_id: JobId,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the image. Default: none.", file_okay=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Wait until a job has finished; exit code 1 unless it succeeded."""
    with api() as client:
        _finish(client, client.job(job_id), wait=True, out=out, as_json=as_json)


@app.command()
def cancel(job_id: JobId, as_json: AsJson = False) -> None:
    """Cancel a job: at once while queued, after the current step while running."""
    with api() as client:
        print_result(client.cancel_job(job_id), job_summary, as_json=as_json)


@app.command()
def retry(job_id: JobId, as_json: AsJson = False) -> None:
    """Submit a failed, canceled or expired job again, as a new job."""
    with api() as client:
        print_result(client.retry_job(job_id), job_summary, as_json=as_json)


@app.command()
def delete(job_id: JobId) -> None:
    """Delete a job's image, prompt and all other input."""
    with api() as client:
        client.delete_job(job_id)
    console().print(f"deleted {job_id}", markup=False)


def _finish(client: "Client", job: Json, *, wait: bool, out: Path | None, as_json: bool) -> None:
    """Wait for the job and save its image, as far as asked; print it and exit by its status."""
    if wait or out is not None:
        job = _until_finished(client, job)
    files = [] if out is None else _save(client, job, out)
    print_result(job, partial(job_summary, files=files), as_json=as_json)
    if job["status"] in FINISHED - {Status.SUCCEEDED}:
        raise typer.Exit(EXIT_JOB_FAILED)


def _until_finished(client: "Client", job: Json) -> Json:
    with console().status(_line(job)) as line:
        while job["status"] not in FINISHED:
            job = client.job(job["id"], wait=True, wait_s=_WATCH_S)
            line.update(_line(job))
    return job


def _line(job: Json) -> str:
    queue = job["queue"]
    if queue is None:
        return f"{job['id']} {job['status']}"
    position = "" if queue["position"] is None else f"number {queue['position']:,}"
    return ", ".join(filter(None, [f"{job['id']} queued", position, eta(queue)]))


def _save(client: "Client", job: Json, folder: Path) -> list[Path]:
    from darkroom.client import download

    folder.mkdir(parents=True, exist_ok=True)
    lines = [download.manifest_line(job)]
    summary = download.download(client, lines, folder, on_line=lambda: None)
    return [image.file for image in summary.images]
