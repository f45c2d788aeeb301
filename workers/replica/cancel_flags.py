"""Tells a model, while it draws, which of its rows are not wanted any more.

A file for each call, a byte for each row, which the model reads before each step. Triton has no
way to say that: it cancels a request as a whole.
"""

import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from workers.replica.triton_runtime import owned_prefix


class CancelFlags:
    """The files of one replica, in a folder that only its user can enter."""

    def __init__(self) -> None:
        # named so that whoever sweeps for leftovers knows when its process is dead
        self.folder = Path(tempfile.mkdtemp(prefix=f"{owned_prefix()}-"))

    @contextmanager
    def kept(self, call_id: str, *, rows: int) -> Iterator[None]:
        """While the block runs, rows of this call can be withdrawn."""
        file = self.folder / call_id
        file.write_bytes(bytes(rows))
        try:
            yield
        finally:
            file.unlink(missing_ok=True)

    def withdraw(self, call_id: str, rows: Collection[int]) -> bool:
        """False when there is no such call, or no more: it may not have come yet."""
        try:
            with (self.folder / call_id).open("r+b") as file:
                for row in rows:
                    file.seek(row)
                    file.write(b"\x01")
        except FileNotFoundError:
            return False
        return True

    def remove(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.folder, ignore_errors=True)
