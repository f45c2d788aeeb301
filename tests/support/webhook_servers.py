"""API and sender of webhooks for tests: real processes on the test's own database."""

import signal
import subprocess
import sys
import time

import httpx2
import pytest

from tests.support.api_server import serve, stop
from tests.support.webhook_receiver import receiving

PRIVATE = {"DARKROOM_WEBHOOK_ALLOW_PRIVATE": "1"}


class SenderProcess:
    """Process of `python -m workers send-webhooks` that can be killed and started again."""

    def __init__(self, environment, folder):
        self._environment = environment
        self.log = folder / "sender.log"
        self._ready = folder / "sender-ready"
        self.process = None

    def start(self, **environment):
        self._ready.unlink(missing_ok=True)
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "workers", "send-webhooks"],
                env=self._environment | {"DARKROOM_READY_FILE": str(self._ready)} | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + 60
        while not self._ready.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(45) in {0, -signal.SIGTERM}, self.log.read_text()


@pytest.fixture
def receiver():
    with receiving() as running:
        yield running


@pytest.fixture(scope="session")
def webhook_environment(api_environment):
    return api_environment | PRIVATE | {"DARKROOM_WEBHOOK_ENCRYPTION_KEYS": "a long random text"}


@pytest.fixture(scope="session")
def webhook_api(webhook_environment, tmp_path_factory):
    """Client of an API that allows webhooks to loopback."""
    process, url = serve(webhook_environment, tmp_path_factory.mktemp("api") / "log")
    with httpx2.Client(base_url=url, timeout=60) as client:
        yield client
    stop(process)


@pytest.fixture(scope="session")
def sender(webhook_environment, tmp_path_factory):
    """Running sender."""
    running = SenderProcess(webhook_environment, tmp_path_factory.mktemp("sender"))
    running.start()
    yield running
    running.stop()
