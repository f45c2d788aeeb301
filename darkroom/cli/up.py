"""`darkroom up`: from the command line to the local stack."""

from pathlib import Path
from typing import Annotated

import typer

from darkroom.cli.session import EXIT_USAGE, requires_extra
from darkroom.errors import SetupError


def up(
    port: Annotated[int, typer.Option(help="Port of the API; 0 picks a free one.")] = 8000,
    data_dir: Annotated[Path, typer.Option(help="Folder for the stack's data.")] = Path(
        ".darkroom"
    ),
    workers: Annotated[int, typer.Option(min=1, help="Number of worker processes.")] = 1,
    command: Annotated[
        list[str] | None,
        typer.Argument(help="After `--`: run this against the stack, then stop it."),
    ] = None,
) -> None:
    """Run the whole stack on this machine until Ctrl-C.

    With a command after `--`, the exit code is the command's.
    """
    with requires_extra("local"):
        from darkroom.local.up import up as run_stack
        from darkroom.settings import load_settings

    load_settings()  # an invalid value is reported before the first process starts
    try:
        code = run_stack(data_dir, port=port, workers=workers, command=command or [])
    except SetupError as problem:
        typer.echo(f"darkroom up: {problem}", err=True)
        raise typer.Exit(EXIT_USAGE) from problem
    raise typer.Exit(code)
