"""What an API process of the tests runs. Imports little: each process imports this module first."""

import os
import sys


def run_api(environment: dict[str, str], log: str) -> None:
    """Become `python -m api` with this environment, and its output in `log`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["api"]
    from api.__main__ import main

    sys.exit(main())
