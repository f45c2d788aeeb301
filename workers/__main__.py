"""Command line of the workers: `python -m workers run | send-webhooks | serve | replace`."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Final

#: Module whose `main(arguments)` runs the command, and one line of help. A module is imported only
#: for its own command: the one with Ray takes seconds.
COMMANDS: Final = {
    "run": ("workers.app", "claim microbatches, generate them on Ray Serve, store the images"),
    "send-webhooks": ("workers.webhooks.app", "send due webhook deliveries"),
    "serve": ("workers.deploy.serve", "deploy the models on the Ray cluster until SIGTERM"),
    "replace": ("workers.deploy.replace", "replace a model's engine if golden images agree"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with the arguments after its name."""
    parser = argparse.ArgumentParser(
        prog="python -m workers",
        description="The processes beside the API. `python -m workers COMMAND --help` has more.",
        epilog="Configured by DARKROOM_* variables; see .env.example.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    chosen, rest = parser.parse_known_args(arguments)
    module, _ = COMMANDS[chosen.command]
    code: int = importlib.import_module(module).main(rest)
    return code


if __name__ == "__main__":
    sys.exit(main())
