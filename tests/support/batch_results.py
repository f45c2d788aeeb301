"""Reads the results of a batch as a client does."""

import io
import json
import zipfile
from typing import Any

import httpx2


def manifest_of(http: httpx2.Client, batch: dict[str, Any]) -> list[dict[str, Any]]:
    text = http.get(batch["urls"]["manifest"]).text
    return [json.loads(line) for line in text.splitlines()]


def archive_of(http: httpx2.Client, batch: dict[str, Any]) -> zipfile.ZipFile:
    return zipfile.ZipFile(io.BytesIO(http.get(batch["urls"]["images"]).content))
