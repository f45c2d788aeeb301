"""Dispatch in flight: what other threads may do to it while one thread runs it."""

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from workers.generation.generator import GenerateCall


class InFlightDispatch:
    """Jobs of a dispatch: which call generates them now, and which are canceled."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._call: GenerateCall | None = None
        self._indices: dict[str, int] = {}  #: in the call, of the jobs it has not finished
        self._canceled: frozenset[str] = frozenset()
        self._stopped = False

    @contextmanager
    def generating(self, call: GenerateCall, job_ids: Sequence[str]) -> Iterator[None]:
        """Let the call be canceled by other threads while the block runs, and by its failure."""
        with self._lock:
            self._call, self._indices = call, {job_id: at for at, job_id in enumerate(job_ids)}
            stopped = self._stopped
        if stopped:
            call.cancel()
        try:
            yield
        except BaseException:
            call.cancel()
            raise
        finally:
            with self._lock:
                self._call, self._indices = None, {}

    def finish(self, job_id: str) -> None:
        """Note that the call has finished this job."""
        with self._lock:
            self._indices.pop(job_id, None)

    def is_canceled(self, job_id: str) -> bool:
        """Return whether the job was canceled."""
        return job_id in self._canceled

    def cancel(self, job_ids: Collection[str]) -> None:
        """Mark jobs as canceled. Idempotent; call again until the dispatch is settled."""
        with self._lock:
            self._canceled |= frozenset(job_ids)
            call, unfinished = self._call, len(self._indices)
            gone = [index for job_id, index in self._indices.items() if job_id in self._canceled]
        if call is None or not gone:
            return
        if len(gone) == unfinished:
            call.cancel()  # also where it only waits for other microbatches
        else:
            call.cancel_rows(gone)

    def stop(self) -> None:
        """Generate no more of the dispatch: other workers have its jobs, or will."""
        with self._lock:
            self._stopped = True
            call = self._call
        if call is not None:
            call.cancel()
