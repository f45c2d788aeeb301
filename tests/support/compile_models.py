"""Runs `python -m compile` for several models in one process, for tests.

Loading PyTorch and its exporter takes longer than a tiny model. Its argument: each run's words, as
JSON. It prints what each of them said, as JSON too, and leaves with 1 at the first that failed.
"""

import contextlib
import io
import json
import os
import sys

from compile.__main__ import main


def said_by(words: list[str]) -> str:
    """What one run said."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = main(words)
    if code:
        sys.exit(f"{words} left with {code}:\n{said.getvalue()}")
    return said.getvalue()


if __name__ == "__main__":
    os.nice(10)  # minutes of work: tests with deadlines, beside it, go first
    json.dump([said_by(words) for words in json.loads(sys.argv[1])], sys.stdout)
