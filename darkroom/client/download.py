"""A batch's pictures in a folder: one file each, a manifest and a contact sheet."""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont

from darkroom.client.http import Client, Unreachable
from darkroom.generation import file_names
from darkroom.generation.params import OutputFormat
from darkroom.prefetch import map_ordered

Line = dict[str, Any]  #: of a manifest

MANIFEST: Final = "manifest.jsonl"
CONTACT_SHEET: Final = "contact-sheet.png"
MOST_SHOWN: Final = 600  #: pictures on one contact sheet
_THREADS: Final = 8
_COLUMNS: Final = 6
_CELL: Final = 192  # pixels
_CAPTION: Final = 34
_CAPTION_CHARS: Final = 34
_MARGIN: Final = 12


@dataclass(frozen=True)
class DownloadedImage:
    """A picture that has arrived, and what was asked for."""

    file: Path
    parameters: Line


@dataclass
class DownloadSummary:
    """What lies in the folder after a download."""

    fetched: int = 0
    kept: int = 0  #: they were there already, unharmed
    waiting: int = 0  #: jobs that have no picture, or not yet
    shown: Sequence[DownloadedImage] = ()  #: the first pictures

    @property
    def pictures(self) -> int:
        """All that are there."""
        return self.fetched + self.kept


def download_batch(
    client: Client, batch_id: str, folder: Path, *, on_line: Callable[[], None]
) -> DownloadSummary:
    """Fetch what is drawn by now, unless it lies there unharmed; then manifest and contact sheet.

    Raises Unreachable when a picture cannot be had, or does not fit its hash. What has arrived
    stays, so that the next download goes on from there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / MANIFEST
    client.save(f"/v1/batches/{batch_id}/manifest.jsonl", manifest)
    gallery = download(client, _lines(manifest), folder, on_line=on_line)
    contact_sheet(gallery.shown, folder / CONTACT_SHEET)
    return gallery


def _lines(manifest: Path) -> Iterator[Line]:
    with manifest.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def download(
    client: Client, lines: Iterable[Line], folder: Path, *, on_line: Callable[[], None]
) -> DownloadSummary:
    """Fetch the pictures of these lines. Raises Unreachable as `download_batch`."""
    gallery = DownloadSummary()
    shown: list[DownloadedImage] = []
    for line, fetched in map_ordered(partial(_fetch, client, folder), lines, threads=_THREADS):
        on_line()
        if fetched is None:
            gallery.waiting += 1
            continue
        gallery.fetched += fetched
        gallery.kept += not fetched
        if len(shown) < MOST_SHOWN:
            shown.append(DownloadedImage(folder / line["file"], line["parameters"]))
    gallery.shown = shown
    return gallery


def _fetch(client: Client, folder: Path, line: Line) -> bool | None:
    """Whether the picture had to be fetched; None when there is none."""
    if line["file"] is None:
        return None
    if Path(line["file"]).name != line["file"]:
        raise Unreachable(f"{line['id']}: {line['file']!r} is no name for a file; wrong server?")
    path = folder / line["file"]
    if path.exists() and _sha256(path.read_bytes()) == line["sha256"]:
        return False
    image = client.image(line["id"], line["url"])
    if _sha256(image) != line["sha256"]:
        raise Unreachable(f"the image of {line['id']} came damaged; download again")
    partial_file = path.with_name(path.name + ".part")
    partial_file.write_bytes(image)
    partial_file.replace(path)
    return True


def line_of(job: Line) -> Line:
    """A single job, as the manifest of a batch would have it."""
    image = job["image"]
    asked = job["input"]
    name = file_names.alone(asked["prompt"], OutputFormat(asked["output_format"]), job_id=job["id"])
    return {
        "id": job["id"],
        "parameters": asked,
        "file": name if image else None,
        "sha256": image and image["sha256"],
        "url": image and image["url"],
    }


def contact_sheet(pictures: Sequence[DownloadedImage], path: Path) -> None:
    """The pictures small on one sheet, each with its prompt."""
    columns = min(_COLUMNS, len(pictures)) or 1
    lines = -(-len(pictures) // columns)
    width = columns * (_CELL + _MARGIN) + _MARGIN
    height = lines * (_CELL + _CAPTION + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, max(height, _MARGIN)), "white")
    for place, picture in enumerate(pictures):
        line, column = divmod(place, columns)
        corner = (
            _MARGIN + column * (_CELL + _MARGIN),
            _MARGIN + line * (_CELL + _CAPTION + _MARGIN),
        )
        _paste(sheet, picture, corner)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())


def _paste(sheet: Image.Image, shown: DownloadedImage, corner: tuple[int, int]) -> None:
    with Image.open(shown.file) as picture:
        small = picture.convert("RGB")
        small.thumbnail((_CELL, _CELL), Image.Resampling.LANCZOS)
    sheet.paste(small, corner)
    asked = shown.parameters
    facts = f"{asked['num_inference_steps']} steps, guidance {asked['guidance_scale']:g}"
    caption = f"{_fitting(asked['prompt'])}\n{facts}, seed {asked['seed']}"
    below = (corner[0], corner[1] + _CELL + 3)
    ImageDraw.Draw(sheet).text(below, caption, fill="#333", font=ImageFont.load_default(11))


def _fitting(prompt: str) -> str:
    return prompt if len(prompt) <= _CAPTION_CHARS else prompt[: _CAPTION_CHARS - 2] + "…"


def _sha256(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()
