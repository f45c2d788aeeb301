"""Files of rows, as clients write and send them."""

import csv
import io
from collections.abc import Collection, Iterable, Mapping

import httpx2

from tests.support.api_server import CSV

NDJSON = {"Content-Type": "application/x-ndjson"}


def send(
    http: httpx2.Client,
    content: str | bytes | Iterable[bytes],
    headers: Mapping[str, str] = CSV,
    **params: object,
) -> httpx2.Response:
    return http.post("/v1/batches", content=content, headers=headers, params=params)


def table(count: int, bad: Collection[int] = ()) -> str:
    """Return a file of so many rows; those in `bad` ask for no steps."""
    rows = (f'"a red apple, {n}",{n},{0 if n in bad else 4}\n' for n in range(1, count + 1))
    return "prompt,seed,steps\n" + "".join(rows)


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))
