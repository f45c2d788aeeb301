"""The Python client of the HTTP API."""

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import httpx2

from darkroom.imports.formats import format_of_file

Json = dict[str, Any]

_LONG_POLL_S: Final = 30
_INSIST_S: Final = 30.0
_PAUSE_S: Final = 1.0
_BUSY: Final = frozenset({429, 503})


class ApiError(Exception):
    """The API refused: its problem, as RFC 9457 says it."""

    def __init__(self, problem: Json) -> None:
        super().__init__(str(problem.get("detail", problem)))
        self.problem = problem
        self.status = int(problem.get("status", 500))


class Unreachable(Exception):
    """No answer from the API; `sent`: though it may have had the request."""

    def __init__(self, message: str, *, sent: bool = False) -> None:
        super().__init__(message)
        self.sent = sent


class Client:
    """`with Client(url) as client:`. Every method raises ApiError or Unreachable."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._url = url
        # Two minutes: a server busy with a large file may take that long to judge all of it.
        self._http = httpx2.Client(base_url=url, headers=headers, timeout=120)
        self._storage = httpx2.Client(timeout=60)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.close()
        self._storage.close()

    def submit(self, job: Mapping[str, object]) -> Json:
        """Queue one job."""
        return self._ask("POST", "/v1/jobs", json=dict(job))

    def job(self, job_id: str, *, wait: bool = False, wait_s: int = _LONG_POLL_S) -> Json:
        """The job now, or the next time its wait ends: then look whether it has finished."""
        headers = {"Prefer": f"wait={wait_s}"} if wait else {}
        return self._ask("GET", f"/v1/jobs/{job_id}", headers=headers)

    def cancel_job(self, job_id: str) -> Json:
        """Withdraw it; the job as it is now."""
        return self._ask("POST", f"/v1/jobs/{job_id}/cancel")

    def retry_job(self, job_id: str) -> Json:
        """The new job that asks for the same as one that ended without a picture."""
        return self._ask("POST", f"/v1/jobs/{job_id}/retry")

    def delete_job(self, job_id: str) -> None:
        """Remove its picture and all that was written about it."""
        self._send("DELETE", f"/v1/jobs/{job_id}")

    def submit_file(self, file: Path, params: Mapping[str, str] | None = None) -> Json:
        """Queue a file of rows, sent as it is read; `params` as the API has them.

        Carries a key of its own, so that it can be and is sent again, for half a minute, when the
        answer does not come. With `dry_run` the answer is what would become of it.
        """
        media_type = format_of_file(file.name)
        headers = {"Content-Type": media_type, "Idempotency-Key": uuid.uuid4().hex}

        def send() -> Json:
            with file.open("rb") as body:
                return self._ask(
                    "POST", "/v1/batches", params=dict(params or {}), content=body, headers=headers
                )

        return _insist(send)

    def batch(self, batch_id: str) -> Json:
        """The batch and its counts now."""
        return self._ask("GET", f"/v1/batches/{batch_id}")

    def change_batch(self, batch_id: str, verb: Literal["cancel", "pause", "resume"]) -> Json:
        """The batch after that."""
        return self._ask("POST", f"/v1/batches/{batch_id}/{verb}")

    def retry_batch(self, batch_id: str) -> Json:
        """The new batch of this one's failed jobs."""
        return self._ask("POST", f"/v1/batches/{batch_id}/retry")

    def queue(self) -> Json:
        """How much waits, and how fast it is drawn."""
        return self._ask("GET", "/v1/queue")

    def order(self, verb: Literal["drain", "pause", "resume"]) -> Json:
        """What holds for the whole installation after that."""
        return self._ask("POST", f"/v1/admin/{verb}")

    def purge(self) -> Json:
        """Cancel all that waits, of everybody; how many."""
        return self._ask("POST", "/v1/admin/purge", json={"confirm": "purge"})

    def failed(self) -> Iterator[Json]:
        """The jobs that failed and were not retried, of all tenants, newest first."""
        return self._pages("/v1/admin/failed", {})

    def retry_failed(self, job_id: str) -> Json:
        """The new job that asks for the same as one that failed, of whichever tenant."""
        return self._ask("POST", f"/v1/admin/failed/{job_id}/retry")

    def save(self, path: str, file: Path) -> None:
        """Write what the API streams at this path into a file, whole or not at all."""
        partial = file.with_name(file.name + ".part")
        try:
            with self._http.stream("GET", path) as response, partial.open("wb") as out:
                if response.is_error:
                    response.read()
                    raise ApiError(_problem(response))
                for chunk in response.iter_bytes():
                    out.write(chunk)
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error
        partial.replace(file)

    def image(self, job_id: str, url: str | None = None) -> bytes:
        """The finished picture; from this URL, or a fresh one if it has expired."""
        if url is None:
            url = self._send("GET", f"/v1/jobs/{job_id}/image").headers["location"]
            return self._fetch(job_id, url)
        try:
            return self._fetch(job_id, url)
        except Unreachable:
            return self.image(job_id)

    def create_webhook(self, url: str, events: Sequence[str] | None = None) -> Json:
        """A new endpoint with its secret, which is shown this once; without `events`, all."""
        asked = {"url": url} | ({"events": list(events)} if events else {})
        return self._ask("POST", "/v1/webhooks", json=asked)

    def webhooks(self) -> Iterator[Json]:
        """All endpoints, newest first."""
        return self._pages("/v1/webhooks", {})

    def change_webhook(
        self, webhook_id: str, verb: Literal["test", "enable", "rotate-secret"]
    ) -> Json:
        """What came of that: the delivery of a test, otherwise the endpoint."""
        return self._ask("POST", f"/v1/webhooks/{webhook_id}/{verb}")

    def delete_webhook(self, webhook_id: str) -> None:
        """Tell it nothing any more."""
        self._send("DELETE", f"/v1/webhooks/{webhook_id}")

    def webhook_secret(self, *, rotate: bool = False) -> Json:
        """What signs webhooks to the URLs of single jobs and batches."""
        if rotate:
            return self._ask("POST", "/v1/webhook-secret/rotate")
        return self._ask("GET", "/v1/webhook-secret")

    def deliveries(self, which: Mapping[str, str]) -> Iterator[Json]:
        """Newest first; `which`: webhook_id, job_id, batch_id, status."""
        return self._pages("/v1/deliveries", which)

    def delivery(self, delivery_id: str) -> Json:
        """The delivery and its attempts so far."""
        return self._ask("GET", f"/v1/deliveries/{delivery_id}")

    def replay(self, delivery_id: str) -> Json:
        """Send it anew."""
        return self._ask("POST", f"/v1/deliveries/{delivery_id}/replay")

    def replay_failed(self, since: str, webhook_id: str | None = None) -> Json:
        """Send anew all that ended exhausted since then; how many."""
        asked = {"since": since} | ({"webhook_id": webhook_id} if webhook_id else {})
        return self._ask("POST", "/v1/deliveries/replay", json=asked)

    def _pages(self, path: str, params: Mapping[str, str]) -> Iterator[Json]:
        asked = {"limit": "100", **params}
        while True:
            page = self._ask("GET", path, params=asked)
            yield from page["data"]
            if page["next_cursor"] is None:
                return
            asked["cursor"] = page["next_cursor"]

    def _fetch(self, job_id: str, url: str) -> bytes:
        try:
            # Another client: the storage must not see our API key.
            return self._storage.get(url).raise_for_status().content
        except httpx2.HTTPError as error:
            raise Unreachable(f"the image of {job_id} could not be fetched: {error}") from error

    def _ask(self, method: str, path: str, **request: Any) -> Json:  # httpx2's own
        answer: Json = self._send(method, path, **request).json()
        return answer

    def _send(self, method: str, path: str, **request: Any) -> httpx2.Response:
        try:
            response = self._http.request(method, path, **request)
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error
        if response.is_error:
            raise ApiError(_problem(response))
        return response

    def _unreachable(self, error: httpx2.HTTPError) -> Unreachable:
        return Unreachable(
            f"no answer from {self._url} ({type(error).__name__}); "
            "is it running (`darkroom up`), and does DARKROOM_API name it?",
            sent=not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout),
        )


def _insist(send: Callable[[], Json]) -> Json:
    """Ask again while the answer is lost on the way or the server is busy; not if none is there."""
    began = time.monotonic()
    seen = False  # by a server, at least once
    while True:
        try:
            return send()
        except Unreachable as error:
            seen |= error.sent
            if not seen or time.monotonic() - began > _INSIST_S:
                raise
        except ApiError as error:
            if error.status not in _BUSY or time.monotonic() - began > _INSIST_S:
                raise
        time.sleep(_PAUSE_S)


def _problem(response: httpx2.Response) -> Json:
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if isinstance(problem, dict):
        return problem
    return {"status": response.status_code, "detail": f"HTTP {response.status_code}"}
