"""`python -m tests.chaos.worker`: a worker of this project whose replicas are
`tests.chaos.replica`.

Only the generator is not the product's: claims, leases, storage and maintenance are.
"""

import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from darkroom.errors import GeneratorUnavailable, MicrobatchCanceled, MicrobatchCrashed
from darkroom.settings import load_settings
from tests.chaos import replica
from workers.app import celery_arguments, open_worker_process, worker_app
from workers.generation.generator import Finished, Image, Started


class SubprocessGenerator:
    """One process for each thread that pumps, started when it is first needed or was lost."""

    def __init__(self, timeout_s):
        self._timeout_s = timeout_s
        self._mine = threading.local()

    def connect(self):
        pass

    def start(self, microbatch, *, alone=False):  # noqa: ARG002  # each is always alone
        process = getattr(self._mine, "process", None)
        if process is None or process.poll() is not None:
            process = self._mine.process = start_replica()
        return SubprocessCall(process, microbatch, self._timeout_s)


def start_replica():
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.Popen(  # where the clocks are faked, those of the worker are
        [sys.executable, "-I", "-S", replica.__file__],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


class SubprocessCall:
    def __init__(self, process, microbatch, timeout_s):
        self._process, self._microbatch, self._timeout_s = process, microbatch, timeout_s
        self._cancelled = False
        self._begun = time.monotonic()
        wanted = [[params.prompt, params.seed] for params in microbatch]
        try:
            process.stdin.write(json.dumps(wanted).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError as error:
            raise GeneratorUnavailable("the replica was dead already") from error

    def events(self, **_):
        yield Started()
        answered, _, _ = select.select([self._process.stdout], [], [], self._timeout_s)
        line = self._process.stdout.readline() if answered else self._stop()
        if self._cancelled:
            raise MicrobatchCanceled
        if not line:
            raise MicrobatchCrashed("the replica died" if answered else "the replica hung")
        elapsed_ms = round((time.monotonic() - self._begun) * 1000)
        for place, color in enumerate(json.loads(line)):
            params = self._microbatch[place]
            pixels = np.full((params.height, params.width, 3), color, np.uint8)
            yield Finished(place, Image(pixels, elapsed_ms))

    def cancel_rows(self, indices):
        """Too fast for that."""

    def cancel(self):
        self._cancelled = True
        self._stop()

    def _stop(self):
        self._process.kill()
        self._process.wait()
        return b""


def main():
    settings = load_settings()
    process = open_worker_process(settings, SubprocessGenerator(settings.microbatch_timeout_s))
    app = worker_app(settings, process, ready_file=Path(os.environ["DARKROOM_READY_FILE"]))
    app.worker_main(list(celery_arguments(settings)))


if __name__ == "__main__":
    main()
