"""The `darkroom` command: what a client and an operator type, and `up`."""

import sys

import typer

from darkroom import __version__
from darkroom.cli import admin, batch, job, keys, tenants, up, webhooks
from darkroom.cli.session import EXIT_USAGE
from darkroom.errors import DarkroomError

app = typer.Typer(
    help="Generate images from prompts. DARKROOM_API is the server's URL (default "
    "http://127.0.0.1:8000), DARKROOM_API_KEY the key it may ask for.",
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
    """Print the version."""
    print(__version__)


def main() -> None:
    """Run the command; print an error in one line and exit with its code."""
    try:
        app()
    except DarkroomError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
