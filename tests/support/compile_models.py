"""Runs `python -m compile` for several models in one process, for tests.

Loading PyTorch and its exporter takes longer than a tiny model. The argument is each run's command
line, as JSON. Prints the output of each, as JSON too; exits with 1 at the first failure.
"""

import contextlib
import io
import json
import os
import sys

from compile.__main__ import main


def output_of(arguments: list[str]) -> str:
    """Return the output of one run."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = main(arguments)
    if code:
        sys.exit(f"{arguments} exited with {code}:\n{output.getvalue()}")
    return output.getvalue()


if __name__ == "__main__":
    os.nice(10)  # minutes of work: tests with deadlines take precedence
    json.dump([output_of(arguments) for arguments in json.loads(sys.argv[1])], sys.stdout)
