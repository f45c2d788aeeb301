"""What a picture's file is called: `0007-a-red-apple-59.png`; unique in its batch."""

import re
from typing import Final

from darkroom.status import OutputFormat

_EXTENSIONS: Final = {OutputFormat.PNG: "png", OutputFormat.JPEG: "jpg", OutputFormat.WEBP: "webp"}
_SLUG_CHARS: Final = 48


def in_batch(
    prompt: str,
    seed: int,
    output_format: OutputFormat,
    *,
    row_number: int,
    image_number: int,
    digits: int = 4,
) -> str:
    """Row, what was asked for, seed. `digits` of the largest row, so that names sort like rows."""
    image = f".{image_number}" if image_number else ""  # a dot, which no slug begins with
    place = f"{row_number:0{digits}d}{image}"
    return f"{place}-{_slug(prompt)}-{seed}.{_EXTENSIONS[output_format]}"


def alone(prompt: str, output_format: OutputFormat, *, job_id: str) -> str:
    """Of a job without a batch."""
    return f"{_slug(prompt)}-{job_id[-8:]}.{_EXTENSIONS[output_format]}"


def _slug(prompt: str) -> str:
    """Nothing that a file system, a shell or an archive minds."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:_SLUG_CHARS].strip("-") or "image"
