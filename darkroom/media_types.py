"""Formats of files of rows, by media type and by file extension."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class Format(StrEnum):
    """How the rows of a file are written."""

    CSV = "text/csv"
    JSON_LINES = "application/x-ndjson"
    JSON = "application/json"


MEDIA_TYPES: Final[Mapping[str, Format]] = {
    "text/csv": Format.CSV,
    "application/csv": Format.CSV,
    "text/tab-separated-values": Format.CSV,
    "application/x-ndjson": Format.JSON_LINES,
    "application/ndjson": Format.JSON_LINES,
    "application/jsonl": Format.JSON_LINES,
    "application/x-jsonlines": Format.JSON_LINES,
    "application/json": Format.JSON,
}
EXTENSIONS: Final[Mapping[str, Format]] = {
    ".csv": Format.CSV,
    ".tsv": Format.CSV,
    ".txt": Format.CSV,
    ".jsonl": Format.JSON_LINES,
    ".ndjson": Format.JSON_LINES,
    ".json": Format.JSON,
}
