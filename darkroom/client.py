"""The Python client of the HTTP API."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx2

Json = dict[str, Any]

_LONG_POLL_S: Final = 30


class ApiError(Exception):
    """The API refused: its problem, as RFC 9457 says it."""

    def __init__(self, problem: Json) -> None:
        super().__init__(str(problem.get("detail", problem)))
        self.problem = problem
        self.status = int(problem.get("status", 500))


class Unreachable(Exception):
    """No answer from the API."""


class Client:
    """`with Client(url) as client:`. Every method raises ApiError or Unreachable."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._url = url
        # Two minutes: a server busy with a large file may take that long to judge all of it.
        self._http = httpx2.Client(base_url=url, headers=headers, timeout=120)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.close()

    def submit(self, job: Mapping[str, object]) -> Json:
        """Queue one job."""
        return self._ask("POST", "/v1/jobs", json=dict(job))

    def job(self, job_id: str, *, wait: bool = False) -> Json:
        """The job now, or the next time its wait ends: then look whether it has finished."""
        headers = {"Prefer": f"wait={_LONG_POLL_S}"} if wait else {}
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

    def submit_csv(self, file: Path, *, label: str | None = None) -> Json:
        """Queue a file of rows, sent as it is read."""
        params = {} if label is None else {"label": label}
        with file.open("rb") as body:
            headers = {"Content-Type": "text/csv"}
            return self._ask("POST", "/v1/batches", params=params, content=body, headers=headers)

    def batch(self, batch_id: str) -> Json:
        """The batch and its counts now."""
        return self._ask("GET", f"/v1/batches/{batch_id}")

    def batch_jobs(self, batch_id: str) -> Iterator[Json]:
        """Every job of the batch, in the order of its rows."""
        params = {"batch_id": batch_id, "limit": "100"}
        while True:
            page = self._ask("GET", "/v1/jobs", params=params)
            yield from page["data"]
            if page["next_cursor"] is None:
                return
            params["cursor"] = page["next_cursor"]

    def image(self, job_id: str) -> bytes:
        """The finished picture, from a fresh URL."""
        redirect = self._send("GET", f"/v1/jobs/{job_id}/image")
        try:
            # A plain request: the storage must not see our API key.
            return httpx2.get(redirect.headers["location"], timeout=60).raise_for_status().content
        except httpx2.HTTPError as error:
            raise Unreachable(f"the image of {job_id} could not be fetched: {error}") from error

    def _ask(self, method: str, path: str, **request: Any) -> Json:  # httpx2's own
        answer: Json = self._send(method, path, **request).json()
        return answer

    def _send(self, method: str, path: str, **request: Any) -> httpx2.Response:
        try:
            response = self._http.request(method, path, **request)
        except httpx2.HTTPError as error:
            raise Unreachable(
                f"no answer from {self._url} ({type(error).__name__}); "
                "is it running (`darkroom up`), and does DARKROOM_API name it?"
            ) from error
        if response.is_error:
            raise ApiError(_problem(response))
        return response


def _problem(response: httpx2.Response) -> Json:
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if isinstance(problem, dict):
        return problem
    return {"status": response.status_code, "detail": f"HTTP {response.status_code}"}
