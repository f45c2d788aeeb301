"""`darkroom webhooks`: who is told what happens, and what became of it."""

import time
from typing import Annotated, Any, Final

import typer

from darkroom.cli.session import EXIT_JOB_FAILED, EXIT_USAGE, api, console, print_json
from darkroom.client.http import Client
from darkroom.event_types import SUBSCRIBABLE
from darkroom.status import DeliveryStatus
from darkroom.webhooks import signatures

Json = dict[str, Any]

_TEST_WITHIN_S: Final = 30.0  # longer than one attempt may take
_POLL_S: Final = 0.2

app = typer.Typer(
    help="Webhooks: add a URL, try it, see what was sent, send it anew.", no_args_is_help=True
)
WebhookId = Annotated[str, typer.Argument(metavar="WEBHOOK_ID")]


@app.command()
def add(
    url: Annotated[str, typer.Argument(help="https, at a public address.")],
    event: Annotated[
        list[str] | None,
        typer.Option(help=f"Repeatable; default all: {', '.join(SUBSCRIBABLE)}."),
    ] = None,
) -> None:
    """Have events sent to a URL. Prints the secret that signs them, this once."""
    with api() as client:
        print_json(client.create_webhook(url, event))


@app.command("list")
def list_() -> None:
    """One line a webhook: id, state, URL, events."""
    with api() as client:
        for webhook in client.webhooks():
            state = webhook["disabled_reason"] or webhook["status"]
            print(f"{webhook['id']}  {state}  {webhook['url']}  {','.join(webhook['events'])}")


@app.command()
def test(webhook_id: WebhookId) -> None:
    """Send it a test and say how it went; exit code 1 unless it was accepted at once."""
    with api() as client:
        delivery = _tried(client, client.change_webhook(webhook_id, "test"))
    print_json(delivery)
    if delivery["status"] != DeliveryStatus.ACCEPTED:
        raise typer.Exit(EXIT_JOB_FAILED)


def _tried(client: Client, delivery: Json) -> Json:
    """The delivery after its first attempt, or when it took too long."""
    deadline = time.monotonic() + _TEST_WITHIN_S
    while not delivery["attempts"] and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        delivery = client.delivery(delivery["id"])
    if not delivery["attempts"]:
        console().print("not tried yet: does a sender run (python -m workers send-webhooks)?")
    return delivery


@app.command()
def deliveries(
    webhook_id: Annotated[
        str | None, typer.Argument(metavar="[WEBHOOK_ID]", help="Default: all of them.")
    ] = None,
    status: Annotated[DeliveryStatus | None, typer.Option(help="Only those.")] = None,
    job: Annotated[str | None, typer.Option(help="Only of this job.")] = None,
    batch: Annotated[str | None, typer.Option(help="Only of this batch.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 20,
) -> None:
    """One line a delivery: id, time, status, type, subject, how its attempts ended."""
    which = {"webhook_id": webhook_id, "status": status, "job_id": job, "batch_id": batch}
    with api() as client:
        found = client.deliveries({name: value for name, value in which.items() if value})
        for _, delivery in zip(range(limit), found, strict=False):
            print(_line(delivery))


def _line(delivery: Json) -> str:
    subject = delivery["job_id"] or delivery["batch_id"] or "-"
    attempts = ",".join(attempt["outcome"] for attempt in delivery["attempts"]) or "-"
    described = (delivery["created_at"], delivery["status"], delivery["type"], subject, attempts)
    return "  ".join((delivery["id"], *described))


@app.command()
def replay(
    delivery_id: Annotated[str | None, typer.Argument(metavar="[DELIVERY_ID]")] = None,
    since: Annotated[
        str | None, typer.Option(help="All that failed for good since then, e.g. 2026-01-31T12:00Z")
    ] = None,
    webhook: Annotated[str | None, typer.Option(help="With --since: only this one's.")] = None,
) -> None:
    """Send one delivery anew, or all that failed since a time; each under its old webhook-id."""
    if (delivery_id is None) == (since is None):
        console().print("error: give either a DELIVERY_ID or --since", style="red")
        raise typer.Exit(EXIT_USAGE)
    with api() as client:
        if delivery_id is not None:
            print_json(client.replay(delivery_id))
        elif since is not None:
            print_json(client.replay_failed(since, webhook))


@app.command()
def rotate(webhook_id: WebhookId) -> None:
    """A new secret, printed this once; for 24 hours webhooks carry both signatures."""
    with api() as client:
        print_json(client.change_webhook(webhook_id, "rotate-secret"))


@app.command()
def enable(webhook_id: WebhookId) -> None:
    """Call it again, after a 410 or five days of failures."""
    with api() as client:
        print_json(client.change_webhook(webhook_id, "enable"))


@app.command()
def remove(webhook_id: WebhookId) -> None:
    """Tell it nothing any more."""
    with api() as client:
        client.delete_webhook(webhook_id)
    print(f"removed {webhook_id}")


@app.command()
def secret(
    rotate: Annotated[bool, typer.Option("--rotate", help="Make a new one.")] = False,
) -> None:
    """What signs webhooks to the URLs of single jobs and batches."""
    with api() as client:
        print_json(client.webhook_secret(rotate=rotate))


@app.command("new-key")
def new_key() -> None:
    """Print a new ed25519 key for DARKROOM_WEBHOOK_SIGNING_KEY; asks no server."""
    print(signatures.new_private_key())
