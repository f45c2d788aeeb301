"""Files that are not rows in UTF-8 are refused by the name of what they are."""

import bz2
import gzip
import lzma

import pytest

from darkroom.imports.formats import UnsupportedFile
from darkroom.media_types import Format
from tests.support.import_rows import read_jobs


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0", "PNG"),
        (b"\xff\xd8\xff\xe0", "JPEG"),
        (b"GIF89a", "GIF"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "WebP"),
        (gzip.compress(b"prompt\na\n", mtime=0), "gzip"),
        (b"PK\x03\x04" + b"\0" * 26 + b"[Content_Types].xml", "XLSX"),
        (b"PK\x03\x04" + b"\0" * 26 + b"prompts.csv", "ZIP"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "XLS"),
        (b"%PDF-1.7", "PDF"),
        (b"PK\x03\x04" + b"\0" * 26 + b"[Content_Types].xml ... word/document.xml", "DOCX"),
        (
            b"PK\x03\x04" + b"\0" * 26 + b"mimetypeapplication/vnd.oasis.opendocument",
            "OpenDocument",
        ),
        (b"PK\x05\x06" + b"\0" * 18, "ZIP"),
        (bz2.compress(b"prompt\na\n"), "bzip2"),
        (lzma.compress(b"prompt\na\n"), "xz"),
        (b"PAR1\x15\x04", "Parquet"),
        (b"\x7fELF\x02\x01", "binary"),
        (b"prompts.csv" + b"\0" * 89 + b"0000644\0", "binary"),
        (b"\0" * 2000, "binary"),
        ("\u043f\u0440,prompt\na,\n".encode("utf-16-le"), "UTF-16"),
        ("\u043f\u0440,Prompt\na,\n".encode("utf-16-be"), "UTF-16"),
        ("seed,prompt\n1,a\n".encode("utf-32-le"), "UTF-32"),
        ("prompt\na\n".encode("utf-16"), "UTF-16"),
        ("prompt\na\n".encode("utf-16-le"), "UTF-16"),
        ("prompt\na\n".encode("utf-16-be"), "UTF-16"),
        ("prompt\na\n".encode("utf-32"), "UTF-32"),
        (b"\n<!DOCTYPE html><html>", "HTML"),
        (b"\xef\xbb\xbf<html lang=en>", "HTML"),
        (b"<?xml version='1.0'?>", "XML"),
    ],
)
@pytest.mark.parametrize("kind", Format)
def test_a_file_of_another_format_is_refused_by_name(registry, body, name, kind):
    with pytest.raises(UnsupportedFile, match=name):
        read_jobs(registry, body, kind)


@pytest.mark.parametrize(
    "text", ['{"prompt": "a"}\n', '[{"prompt": "a"}]', '\ufeff {"jobs": []}', "[]", "[[1]]"]
)
def test_json_that_is_sent_as_csv_is_refused_with_the_right_type(registry, text):
    with pytest.raises(UnsupportedFile, match="application/json"):
        read_jobs(registry, text)
