"""What an API process of the tests runs. Imports little: each process imports this module first."""

import multiprocessing
import os
import sys
import threading


def run_api(environment: dict[str, str], log: str) -> None:
    """Become `python -m api` with this environment, and its output in `log`."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["api"]
    from api.__main__ import main

    sys.exit(main())


def _exit_with_parent() -> None:
    """A test process that is killed leaves no API process behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
