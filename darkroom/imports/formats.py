"""What kind of file a client has sent: rows that we read, or something to be refused by name."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import IO, Final

from darkroom.errors import DarkroomError
from darkroom.imports.csv_reader import read_csv
from darkroom.imports.json_reader import read_json_array, read_json_lines
from darkroom.imports.records import Table
from darkroom.media_types import EXTENSIONS, MEDIA_TYPES, Format


class UnsupportedFile(DarkroomError):
    """This is not a file of rows, whatever it was called; the message says what it is."""


_HEAD: Final = 1024
_MAGIC: Final[Mapping[bytes, str]] = {
    rb"\x89PNG\r\n\x1a\n": "a PNG image",
    rb"\xff\xd8\xff": "a JPEG image",
    rb"GIF8[79]a": "a GIF image",
    rb"RIFF....WEBP": "a WebP image",
    rb"II\*\0|MM\0\*": "a TIFF image",
    rb"....ftyp": "an image or a film",
    rb"\x1f\x8b": "a gzip archive",
    rb"BZh[1-9]1AY": "a bzip2 archive",
    rb"\xfd7zXZ\0": "an xz archive",
    rb"\x28\xb5\x2f\xfd": "a zstd archive",
    rb"7z\xbc\xaf\x27\x1c|Rar!\x1a": "an archive",
    rb"PK\x03\x04.*word/": "a Word document (DOCX)",
    rb"PK\x03\x04.{26}(\[Content_Types\]|_rels/|xl/|docProps/)": "an Excel workbook (XLSX)",
    rb"PK\x03\x04.{26}mimetypeapplication/vnd\.oasis": "an OpenDocument spreadsheet",
    rb"PK(\x03\x04|\x05\x06)": "a ZIP archive",
    rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an old Excel workbook (XLS)",
    rb"%PDF-": "a PDF",
    rb"PAR1": "a Parquet file",
    rb"SQLite format 3": "an SQLite database",
    rb"\{\\rtf": "a rich text document",
    rb"\s*(\xef\xbb\xbf)?\s*(<!doctype html|<html|<head|<body|<table)": "an HTML page",
    rb"\s*(\xef\xbb\xbf)?\s*<(\?xml|!--|[a-z])": "XML",
    rb"\xff\xfe\0\0|\0\0\xfe\xff": "text in UTF-32",
    rb"\xff\xfe|\xfe\xff|([\x20-\x7e]\0){4}|(\0[\x20-\x7e]){4}": "text in UTF-16",
    rb".*(p\0{3}r\0{3}o\0{3}m\0{3}p\0{3}t)": "text in UTF-32",
    rb".*(p\0r\0o\0m\0p\0t)": "text in UTF-16",
    rb"[^\r\n]*\0\0|\x7fELF|MZ": "a binary file",
}
_JSON: Final = re.compile(rb"\s*(\xef\xbb\xbf)?\s*(\{|\[\s*[\[{\]])")


def format_of_body(content_type: str) -> Format | None:
    """By the header of a request or of its part; None where it names no rows."""
    media_type, _, rest = content_type.partition(";")
    charset = re.search(r"charset\s*=\s*\"?([^\s\";]+)", rest, re.IGNORECASE)
    if charset and charset[1].lower() not in {"utf-8", "utf8", "us-ascii"}:
        raise UnsupportedFile(f"its charset is {charset[1][:32]!r}; save the file as UTF-8")
    return MEDIA_TYPES.get(media_type.strip().lower())


def format_of_file(name: str, content_type: str = "") -> Format:
    """By its extension, then by the type it came with; CSV when neither says anything."""
    by_name = EXTENSIONS.get(PurePosixPath(name).suffix.lower())
    return by_name or format_of_body(content_type) or Format.CSV


def read_table(file: IO[bytes], kind: Format, *, lists: bool) -> Table:
    """The rows in `file`, from its beginning, however far it was read before.

    `lists`: a cell of numbers may hold several. Raises UnsupportedFile for what only claims to be
    rows, and InvalidInput for what cannot be read as such.
    """
    file.seek(0)
    head = file.read(_HEAD)
    file.seek(0)
    for magic, name in _MAGIC.items():
        if re.match(magic, head, re.DOTALL | re.IGNORECASE):
            raise UnsupportedFile(f"this is {name}; send rows as CSV or JSON lines, in UTF-8")
    if kind is Format.CSV and _JSON.match(head):
        message = f"this is JSON; send it as {Format.JSON}, or one object a line as "
        raise UnsupportedFile(f"{message}{Format.JSON_LINES}; in a form, name it .json or .jsonl")
    match kind:
        case Format.CSV:
            return read_csv(file, lists=lists)
        case Format.JSON_LINES:
            return read_json_lines(file)
        case Format.JSON:
            return read_json_array(file)
