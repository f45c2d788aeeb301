"""A batch's pictures in a folder: one file each, a manifest and a contact sheet."""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont

from darkroom.client import Client, Unreachable

Json = dict[str, Any]

MANIFEST: Final = "manifest.jsonl"
CONTACT_SHEET: Final = "contact-sheet.png"
_COLUMNS: Final = 6
_CELL: Final = 192  # pixels
_CAPTION: Final = 34
_CAPTION_CHARS: Final = 34
_MARGIN: Final = 12
_EXTENSIONS: Final = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}


@dataclass(frozen=True)
class Entry:
    """A finished job and where its picture lies; None when it has none."""

    job: Json
    file: Path | None


def download(
    client: Client, jobs: Iterable[Json], folder: Path, *, on_file: Callable[[], None]
) -> list[Entry]:
    """Fetch every picture that is not there already with the right hash, and write the manifest.

    Raises Unreachable when one cannot be had, or does not fit its hash.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def fetch(job: Json) -> Entry:
        entry = Entry(job, _fetch(client, job, folder))
        on_file()
        return entry

    with ThreadPoolExecutor(8) as threads:
        entries = list(threads.map(fetch, jobs))
    lines = (json.dumps(_manifest_line(entry), ensure_ascii=False) + "\n" for entry in entries)
    (folder / MANIFEST).write_text("".join(lines), encoding="utf-8")
    return entries


def _fetch(client: Client, job: Json, folder: Path) -> Path | None:
    if job["image"] is None:
        return None
    path = folder / file_name(job)
    wanted = job["image"]["sha256"]
    if path.exists() and _sha256(path.read_bytes()) == wanted:
        return path
    image = client.image(job["id"])
    if _sha256(image) != wanted:
        raise Unreachable(f"the image of {job['id']} came damaged; download again")
    partial = path.with_suffix(path.suffix + ".part")
    partial.write_bytes(image)
    partial.replace(path)
    return path


def file_name(job: Json) -> str:
    """`0007-a-red-apple.png`: the row, what was asked for, nothing that a file system minds."""
    slug = re.sub(r"[^a-z0-9]+", "-", job["input"]["prompt"].lower())[:48].strip("-")
    extension = _EXTENSIONS[job["image"]["content_type"]]
    if job["row_number"] is None:
        return f"{slug or 'image'}-{job['id'][-8:]}.{extension}"
    number = f"{job['row_number']:04d}"
    return f"{number}-{slug or 'image'}-{job['input']['seed']}.{extension}"


def _manifest_line(entry: Entry) -> Json:
    job = entry.job
    image = job["image"] or {}
    return {
        "id": job["id"],
        "custom_id": job["custom_id"],
        "row_number": job["row_number"],
        "status": job["status"],
        "input": job["input"],
        "file": entry.file.name if entry.file else None,
        "sha256": image.get("sha256"),
        "timings": job["timings"],
        "error": job["error"],
    }


def contact_sheet(entries: Sequence[Entry], path: Path) -> None:
    """All pictures small on one sheet, each with its row and prompt."""
    shown = [(entry, entry.file) for entry in entries if entry.file is not None]
    columns = min(_COLUMNS, len(shown)) or 1
    lines = -(-len(shown) // columns)
    width = columns * (_CELL + _MARGIN) + _MARGIN
    height = lines * (_CELL + _CAPTION + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, max(height, _MARGIN)), "white")
    for place, (entry, file) in enumerate(shown):
        line, column = divmod(place, columns)
        corner = (
            _MARGIN + column * (_CELL + _MARGIN),
            _MARGIN + line * (_CELL + _CAPTION + _MARGIN),
        )
        _paste(sheet, entry, file, corner)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())


def _paste(sheet: Image.Image, entry: Entry, file: Path, corner: tuple[int, int]) -> None:
    with Image.open(file) as picture:
        small = picture.convert("RGB")
        small.thumbnail((_CELL, _CELL), Image.Resampling.LANCZOS)
    sheet.paste(small, corner)
    asked = entry.job["input"]
    facts = f"{asked['num_inference_steps']} steps, guidance {asked['guidance_scale']:g}"
    caption = f"{_fitting(asked['prompt'])}\n{facts}, seed {asked['seed']}"
    below = (corner[0], corner[1] + _CELL + 3)
    ImageDraw.Draw(sheet).text(below, caption, fill="#333", font=ImageFont.load_default(11))


def _fitting(prompt: str) -> str:
    return prompt if len(prompt) <= _CAPTION_CHARS else prompt[: _CAPTION_CHARS - 2] + "…"


def _sha256(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()
