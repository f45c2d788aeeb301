"""A dispatch while a pump works on it, and what other threads may do to it meanwhile."""

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from workers.generation.generator import GenerateCall


class InFlightDispatch:
    """Which call draws which of the dispatch's jobs now, and which of them are still wanted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._call: GenerateCall | None = None
        self._places: dict[str, int] = {}  #: in the call, of the jobs that it still draws
        self._unwanted: frozenset[str] = frozenset()
        self._given_up = False

    @contextmanager
    def drawing(self, call: GenerateCall, job_ids: Sequence[str]) -> Iterator[None]:
        """While the block runs, the call draws these jobs; if it fails, the call ends as well."""
        with self._lock:
            self._call, self._places = call, {job_id: at for at, job_id in enumerate(job_ids)}
            given_up = self._given_up
        if given_up:
            call.cancel()
        try:
            yield
        except BaseException:
            call.cancel()
            raise
        finally:
            with self._lock:
                self._call, self._places = None, {}

    def finished(self, job_id: str) -> None:
        """The call is done with this one."""
        with self._lock:
            self._places.pop(job_id, None)

    def wants(self, job_id: str) -> bool:
        """False once it was withdrawn."""
        return job_id not in self._unwanted

    def withdraw(self, job_ids: Collection[str]) -> None:
        """Nobody wants these any more. To be said again until the dispatch is settled."""
        with self._lock:
            self._unwanted |= frozenset(job_ids)
            call, drawn = self._call, len(self._places)
            gone = [place for job_id, place in self._places.items() if job_id in self._unwanted]
        if call is None or not gone:
            return
        if len(gone) == drawn:
            call.cancel()  # also where it only waits for its turn, behind others
        else:
            call.withdraw(gone)

    def give_up(self) -> None:
        """Draw no more of it: others have these jobs, or are to have them."""
        with self._lock:
            self._given_up = True
            call = self._call
        if call is not None:
            call.cancel()
