"""File names of images, unique in a batch: `0007-a-red-apple-59.png`."""

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
    """Return row, prompt and seed; `digits` of the largest row, so that names sort like rows."""
    image = f".{image_number}" if image_number else ""  # slugs do not start with a dot
    prefix = f"{row_number:0{digits}d}{image}"
    return f"{prefix}-{_slug(prompt)}-{seed}.{_EXTENSIONS[output_format]}"


def alone(prompt: str, output_format: OutputFormat, *, job_id: str) -> str:
    """Return the name for a job without a batch."""
    return f"{_slug(prompt)}-{job_id[-8:]}.{_EXTENSIONS[output_format]}"


def _slug(prompt: str) -> str:
    """Return the prompt's ASCII letters and digits, safe in file systems, shells, archives."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:_SLUG_CHARS].strip("-") or "image"
