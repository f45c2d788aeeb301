"""`darkroom webhooks`: endpoints, their deliveries, and the keys that sign them."""

import time
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from darkroom.cli.session import (
    EXIT_JOB_FAILED,
    AsJson,
    api,
    console,
    fail,
    print_result,
    requires_extra,
)
from darkroom.cli.summaries import delivery_summary, fields_summary
from darkroom.event_types import SUBSCRIBABLE
from darkroom.status import DeliveryStatus

if TYPE_CHECKING:
    from darkroom.client.http import Client

Json = dict[str, Any]

_TEST_TIMEOUT_S: Final = 30.0  # longer than one attempt may take
_POLL_S: Final = 0.2

app = typer.Typer(
    help="Add, test and remove webhook endpoints; list and replay deliveries.",
    no_args_is_help=True,
)
WebhookId = Annotated[str, typer.Argument(metavar="WEBHOOK_ID")]


@app.command()
def add(
    url: Annotated[str, typer.Argument(help="https URL at a public address.")],
    event: Annotated[
        list[str] | None,
        typer.Option(help=f"Event type. Repeatable. Default: all, {', '.join(SUBSCRIBABLE)}."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Add a webhook endpoint and print its signing secret, which is not shown again."""
    with api() as client:
        print_result(client.create_webhook(url, event), fields_summary, as_json=as_json)


@app.command("list")
def list_() -> None:
    """List webhook endpoints, one a line: id, state, URL, events."""
    with api() as client:
        for webhook in client.webhooks():
            state = webhook["disabled_reason"] or webhook["status"]
            print(f"{webhook['id']}  {state}  {webhook['url']}  {','.join(webhook['events'])}")


@app.command("test")
def try_endpoint(webhook_id: WebhookId, as_json: AsJson = False) -> None:
    """Send a test to an endpoint; exit code 1 unless the first attempt is accepted."""
    with api() as client:
        delivery = _attempted(client, client.change_webhook(webhook_id, "test"))
    print_result(delivery, delivery_summary, as_json=as_json)
    if delivery["status"] != DeliveryStatus.ACCEPTED:
        raise typer.Exit(EXIT_JOB_FAILED)


def _attempted(client: "Client", delivery: Json) -> Json:
    """Return the delivery after its first attempt, or as it is after 30 s."""
    deadline = time.monotonic() + _TEST_TIMEOUT_S
    while not delivery["attempts"] and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        delivery = client.delivery(delivery["id"])
    if not delivery["attempts"]:
        console().print("no attempt yet: is a sender running (python -m workers send-webhooks)?")
    return delivery


@app.command()
def deliveries(
    webhook_id: Annotated[
        str | None, typer.Argument(metavar="[WEBHOOK_ID]", help="Default: all endpoints.")
    ] = None,
    status: Annotated[DeliveryStatus | None, typer.Option(help="Default: all.")] = None,
    job: Annotated[str | None, typer.Option(metavar="JOB_ID", help="Default: all jobs.")] = None,
    batch: Annotated[
        str | None, typer.Option(metavar="BATCH_ID", help="Default: all batches.")
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Number of deliveries to list, newest first.")
    ] = 20,
) -> None:
    """List deliveries, one a line: id, time, status, type, job or batch, attempt outcomes."""
    filters = {"webhook_id": webhook_id, "status": status, "job_id": job, "batch_id": batch}
    with api() as client:
        found = client.deliveries({name: value for name, value in filters.items() if value})
        for delivery in islice(found, limit):
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
        str | None,
        typer.Option(
            help="Replay every exhausted delivery since this time, such as 2026-01-31T12:00Z."
        ),
    ] = None,
    webhook: Annotated[
        str | None,
        typer.Option(metavar="WEBHOOK_ID", help="With --since: this endpoint only. Default: all."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send one delivery again, or every exhausted one since a time, with the same webhook-id."""
    if (delivery_id is None) == (since is None):
        raise fail("give either a DELIVERY_ID or --since")
    with api() as client:
        if delivery_id is not None:
            print_result(client.replay(delivery_id), delivery_summary, as_json=as_json)
        elif since is not None:
            print_result(client.replay_failed(since, webhook), fields_summary, as_json=as_json)


@app.command()
def rotate(webhook_id: WebhookId, as_json: AsJson = False) -> None:
    """Replace an endpoint's secret and print it once; for 24 h webhooks carry both signatures."""
    _change(webhook_id, "rotate-secret", as_json=as_json)


@app.command()
def enable(webhook_id: WebhookId, as_json: AsJson = False) -> None:
    """Enable an endpoint again that a 410 or five days of failures disabled."""
    _change(webhook_id, "enable", as_json=as_json)


def _change(webhook_id: str, verb: Literal["enable", "rotate-secret"], *, as_json: bool) -> None:
    with api() as client:
        print_result(client.change_webhook(webhook_id, verb), fields_summary, as_json=as_json)


@app.command()
def remove(webhook_id: WebhookId) -> None:
    """Delete an endpoint and discard its pending deliveries."""
    with api() as client:
        client.delete_webhook(webhook_id)
    print(f"removed {webhook_id}")


@app.command()
def secret(
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Replace the secret by a new one first.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the secret that signs webhooks to the URLs of single jobs and batches."""
    with api() as client:
        print_result(client.webhook_secret(rotate=rotate), fields_summary, as_json=as_json)


@app.command("generate-key")
def generate_key() -> None:
    """Generate an ed25519 key for DARKROOM_WEBHOOK_SIGNING_KEY; needs no server."""
    with requires_extra("server"):
        from darkroom.webhooks import signatures

    print(signatures.new_private_key())
