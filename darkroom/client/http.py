"""The Python client of the HTTP API."""

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import httpx2

from darkroom.media_types import EXTENSIONS, Format

Json = dict[str, Any]

_LONG_POLL_S: Final = 30
_RETRY_FOR_S: Final = 30.0
_RETRY_DELAY_S: Final = 1.0
_BUSY: Final = frozenset({429, 503})


class ApiError(Exception):
    """Refusal by the API; `problem` is its body as RFC 9457 defines it."""

    def __init__(self, problem: Json) -> None:
        super().__init__(str(problem.get("detail", problem)))
        self.problem = problem
        self.status = int(problem.get("status", 500))


class Unreachable(Exception):
    """No response from the API; `sent`: it may have received the request."""

    def __init__(self, message: str, *, sent: bool = False) -> None:
        super().__init__(message)
        self.sent = sent


class Client:
    """Client of one server: `with Client(url) as client:`. Raises ApiError or Unreachable."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._url = url
        # Two minutes: a busy server may take that long to validate all of a large file.
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
        return self._request("POST", "/v1/jobs", json=dict(job))

    def job(self, job_id: str, *, wait: bool = False, wait_s: int = _LONG_POLL_S) -> Json:
        """Return the job; with `wait`, once it has finished or `wait_s` seconds have passed."""
        headers = {"Prefer": f"wait={wait_s}"} if wait else {}
        return self._request("GET", f"/v1/jobs/{job_id}", headers=headers)

    def cancel_job(self, job_id: str) -> Json:
        """Cancel a job; return it as it is now."""
        return self._request("POST", f"/v1/jobs/{job_id}/cancel")

    def retry_job(self, job_id: str) -> Json:
        """Submit a failed, canceled or expired job again; return the new job."""
        return self._request("POST", f"/v1/jobs/{job_id}/retry")

    def delete_job(self, job_id: str) -> None:
        """Delete a job's image, prompt and all other input."""
        self._send("DELETE", f"/v1/jobs/{job_id}")

    def submit_file(self, file: Path, params: Mapping[str, str] | None = None) -> Json:
        """Queue a file of rows, sent as it is read; `params` are the API's query parameters.

        Retries for 30 s with one Idempotency-Key if no response comes. With `dry_run` the result
        is a validation, and no batch.
        """
        media_type = EXTENSIONS.get(file.suffix.lower(), Format.CSV)
        headers = {"Content-Type": media_type, "Idempotency-Key": uuid.uuid4().hex}

        def send() -> Json:
            with file.open("rb") as body:
                return self._request(
                    "POST", "/v1/batches", params=dict(params or {}), content=body, headers=headers
                )

        return _retry(send)

    def batch(self, batch_id: str) -> Json:
        """Return a batch and its counts."""
        return self._request("GET", f"/v1/batches/{batch_id}")

    def change_batch(self, batch_id: str, verb: Literal["cancel", "pause", "resume"]) -> Json:
        """Cancel, pause or resume a batch; return it as it is then."""
        return self._request("POST", f"/v1/batches/{batch_id}/{verb}")

    def retry_batch(self, batch_id: str) -> Json:
        """Submit the failed jobs of a batch again; return the new batch."""
        return self._request("POST", f"/v1/batches/{batch_id}/retry")

    def queue(self) -> Json:
        """Return the queued jobs by class and model, and the images generated per second."""
        return self._request("GET", "/v1/queue")

    def set_queue_control(self, verb: Literal["drain", "pause", "resume"]) -> Json:
        """Drain, pause or resume the whole installation; return its state."""
        return self._request("POST", f"/v1/admin/{verb}")

    def purge(self) -> Json:
        """Cancel every queued job of all tenants; return how many."""
        return self._request("POST", "/v1/admin/purge", json={"confirm": "purge"})

    def failed(self) -> Iterator[Json]:
        """Yield the failed jobs of all tenants that were not retried, newest first."""
        return self._pages("/v1/admin/failed", {})

    def retry_failed(self, job_id: str) -> Json:
        """Submit a failed job of any tenant again; return the new job."""
        return self._request("POST", f"/v1/admin/failed/{job_id}/retry")

    def save(self, path: str, file: Path) -> None:
        """Save what the API streams at this path, the whole file or none."""
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
        """Return a job's image file, from `url`, or from a new URL if that has expired."""
        if url is None:
            url = self._send("GET", f"/v1/jobs/{job_id}/image").headers["location"]
            return self._fetch(job_id, url)
        try:
            return self._fetch(job_id, url)
        except Unreachable:
            return self.image(job_id)

    def create_webhook(self, url: str, events: Sequence[str] | None = None) -> Json:
        """Add an endpoint for `events` (default: all); return it with its secret, shown once."""
        body = {"url": url} | ({"events": list(events)} if events else {})
        return self._request("POST", "/v1/webhooks", json=body)

    def webhooks(self) -> Iterator[Json]:
        """Yield the webhook endpoints, newest first."""
        return self._pages("/v1/webhooks", {})

    def change_webhook(
        self, webhook_id: str, verb: Literal["test", "enable", "rotate-secret"]
    ) -> Json:
        """Test, enable or rotate; return the delivery of a test, otherwise the endpoint."""
        return self._request("POST", f"/v1/webhooks/{webhook_id}/{verb}")

    def delete_webhook(self, webhook_id: str) -> None:
        """Delete an endpoint and discard its pending deliveries."""
        self._send("DELETE", f"/v1/webhooks/{webhook_id}")

    def webhook_secret(self, *, rotate: bool = False) -> Json:
        """Return the secret that signs webhooks to the URLs of single jobs and batches."""
        if rotate:
            return self._request("POST", "/v1/webhook-secret/rotate")
        return self._request("GET", "/v1/webhook-secret")

    def deliveries(self, filters: Mapping[str, str]) -> Iterator[Json]:
        """Yield deliveries, newest first; filter by webhook_id, job_id, batch_id or status."""
        return self._pages("/v1/deliveries", filters)

    def delivery(self, delivery_id: str) -> Json:
        """Return a delivery and its attempts so far."""
        return self._request("GET", f"/v1/deliveries/{delivery_id}")

    def replay(self, delivery_id: str) -> Json:
        """Send a delivery again with the same webhook-id; return it."""
        return self._request("POST", f"/v1/deliveries/{delivery_id}/replay")

    def replay_failed(self, since: str, webhook_id: str | None = None) -> Json:
        """Send every delivery exhausted since then again; return how many."""
        body = {"since": since} | ({"webhook_id": webhook_id} if webhook_id else {})
        return self._request("POST", "/v1/deliveries/replay", json=body)

    def _pages(self, path: str, params: Mapping[str, str]) -> Iterator[Json]:
        query = {"limit": "100", **params}
        while True:
            page = self._request("GET", path, params=query)
            yield from page["data"]
            if page["next_cursor"] is None:
                return
            query["cursor"] = page["next_cursor"]

    def _fetch(self, job_id: str, url: str) -> bytes:
        try:
            # A client of its own: the storage must not see the API key.
            return self._storage.get(url).raise_for_status().content
        except httpx2.HTTPError as error:
            raise Unreachable(f"could not download the image of {job_id}: {error}") from error

    def _request(self, method: str, path: str, **request: Any) -> Json:  # httpx2's arguments
        body: Json = self._send(method, path, **request).json()
        return body

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


def _retry(send: Callable[[], Json]) -> Json:
    """Send again for 30 s if the response is lost or the server is busy, not if none listens."""
    began = time.monotonic()
    received = False  # perhaps by a server, at least once
    while True:
        try:
            return send()
        except Unreachable as error:
            received |= error.sent
            if not received or time.monotonic() - began > _RETRY_FOR_S:
                raise
        except ApiError as error:
            if error.status not in _BUSY or time.monotonic() - began > _RETRY_FOR_S:
                raise
        time.sleep(_RETRY_DELAY_S)


def _problem(response: httpx2.Response) -> Json:
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if isinstance(problem, dict):
        return problem
    return {"status": response.status_code, "detail": f"HTTP {response.status_code}"}
