"""The `darkroom` command: the client's commands, and `up`."""

import sys

import typer

from darkroom import __version__
from darkroom.cli import admin, batch, job, keys, tenants, up, webhooks
from darkroom.cli.session import EXIT_USAGE
from darkroom.errors import DarkroomError

app = typer.Typer(
    help="Prompts in, pictures out. DARKROOM_API and DARKROOM_API_KEY say which server to ask.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("up", context_settings={"allow_extra_args": True})(up.up)
app.command("submit")(job.submit)
app.command("queue")(admin.queue)
app.add_typer(job.app, name="job")
app.add_typer(batch.app, name="batch")
app.add_typer(keys.app, name="keys")
app.add_typer(tenants.app, name="tenants")
app.add_typer(admin.app, name="admin")
app.add_typer(webhooks.app, name="webhooks")


@app.command()
def version() -> None:
    """Say which version this is."""
    print(__version__)


def main() -> None:
    """Entry of the console script."""
    try:
        app()
    except DarkroomError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
