"""System under test that is a whole `darkroom up`: its launcher supervises it."""

import os
from pathlib import Path

from darkroom.db.tables import DEFAULT_TENANT
from tests.chaos.system import DatabaseView
from tests.support.servers import ServerProcess
from tests.support.stack import RunningStack


class StackUnderTest(DatabaseView):
    """One tenant, since its API asks for no key; images are the demo model's."""

    colors_known = False
    restarts = 0
    keys = ("", "")
    tenants = (DEFAULT_TENANT, DEFAULT_TENANT)

    def __init__(self, stack: RunningStack, folder: Path) -> None:
        self.stack, self.folder = stack, folder
        self.url = str(stack.http.base_url)
        self.sessions = stack.sessions
        self.bucket = stack.data_dir / "objects" / "darkroom"
        self.workers: list[ServerProcess] = []

    def recover(self) -> None:
        """What was stopped goes on; what is dead is the launcher's affair."""
        for process in self.stack.find():
            process.resume()
        ready = self.wait_until(lambda: self.stack.http.get("/readyz").status_code == 200)
        assert ready, self.stack.said()

    def kill(self, *words: str, signal: int) -> int:
        """All processes whose command lines hold these words, once there are any; how many."""
        assert self.wait_until(lambda: bool(self.stack.find(*words))), f"there is no {words}"
        found = [each for each in self.stack.find(*words) if each.pid != os.getpid()]
        for process in found:
            process.send_signal(signal)
        return len(found)
