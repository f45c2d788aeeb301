"""`darkroom up`: from the command line to the local stack."""

from pathlib import Path
from typing import Annotated

import typer

from darkroom.errors import SetupError
from darkroom.settings import load_settings


def up(
    port: Annotated[int, typer.Option(help="Port of the API; 0 picks a free one.")] = 8000,
    data_dir: Annotated[Path, typer.Option(help="Where the stack keeps its data.")] = Path(
        ".darkroom"
    ),
    workers: Annotated[int, typer.Option(min=1, help="Number of worker processes.")] = 1,
    command: Annotated[
        list[str] | None, typer.Argument(help="After `--`: run this against the stack, then stop.")
    ] = None,
) -> None:
    """Start the whole stack and keep it running until Ctrl-C.

    With a command after `--`, the exit code is the command's.
    """
    from darkroom.local.up import up as run_stack  # only this command needs the [local] packages

    load_settings()  # what no process could use is told before the first is started
    try:
        code = run_stack(data_dir, port=port, workers=workers, command=command or [])
    except SetupError as problem:
        typer.echo(f"darkroom up: {problem}", err=True)
        raise typer.Exit(2) from problem
    raise typer.Exit(code)
