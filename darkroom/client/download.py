"""A batch's images in a folder: one file each, a manifest and a contact sheet."""

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
from darkroom.prefetch import map_ordered
from darkroom.status import OutputFormat

Line = dict[str, Any]  #: of a manifest

MANIFEST: Final = "manifest.jsonl"
CONTACT_SHEET: Final = "contact-sheet.png"
MAX_IMAGES_SHOWN: Final = 600  #: on one contact sheet
_THREADS: Final = 8
_COLUMNS: Final = 6
_CELL: Final = 192  # pixels
_CAPTION: Final = 34
_CAPTION_CHARS: Final = 34
_MARGIN: Final = 12


@dataclass(frozen=True)
class DownloadedImage:
    """A saved image and the parameters that generated it."""

    file: Path
    parameters: Line


@dataclass
class DownloadSummary:
    """What is in the folder after a download."""

    fetched: int = 0
    kept: int = 0  #: already there, with the right checksum
    missing: int = 0  #: jobs without an image, or not yet finished
    images: Sequence[DownloadedImage] = ()  #: the first MAX_IMAGES_SHOWN

    @property
    def saved(self) -> int:
        """Images in the folder."""
        return self.fetched + self.kept


def download_batch(
    client: Client, batch_id: str, folder: Path, *, on_line: Callable[[], None]
) -> DownloadSummary:
    """Download the images generated so far, then write the manifest and the contact sheet.

    Files that are already there with the right checksum are kept, so that another call continues.
    Raises Unreachable if an image cannot be downloaded or fails its checksum.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / MANIFEST
    client.save(f"/v1/batches/{batch_id}/manifest.jsonl", manifest)
    summary = download(client, _lines(manifest), folder, on_line=on_line)
    write_contact_sheet(summary.images, folder / CONTACT_SHEET)
    return summary


def _lines(manifest: Path) -> Iterator[Line]:
    with manifest.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def download(
    client: Client, lines: Iterable[Line], folder: Path, *, on_line: Callable[[], None]
) -> DownloadSummary:
    """Download the images of these manifest lines. Raises Unreachable as `download_batch`."""
    summary = DownloadSummary()
    images: list[DownloadedImage] = []
    for line, fetched in map_ordered(partial(_fetch, client, folder), lines, threads=_THREADS):
        on_line()
        if fetched is None:
            summary.missing += 1
            continue
        summary.fetched += fetched
        summary.kept += not fetched
        if len(images) < MAX_IMAGES_SHOWN:
            images.append(DownloadedImage(folder / line["file"], line["parameters"]))
    summary.images = images
    return summary


def _fetch(client: Client, folder: Path, line: Line) -> bool | None:
    """Return True if downloaded, False if already there, None if the job has no image."""
    if line["file"] is None:
        return None
    if Path(line["file"]).name != line["file"]:
        raise Unreachable(f"{line['id']}: invalid file name {line['file']!r}; wrong server?")
    path = folder / line["file"]
    if path.exists() and _sha256(path.read_bytes()) == line["sha256"]:
        return False
    image = client.image(line["id"], line["url"])
    if _sha256(image) != line["sha256"]:
        raise Unreachable(f"image of {line['id']} failed its checksum; download it again")
    partial_file = path.with_name(path.name + ".part")
    partial_file.write_bytes(image)
    partial_file.replace(path)
    return True


def manifest_line(job: Line) -> Line:
    """Return what the manifest of a batch would say of this single job."""
    image = job["image"]
    parameters = job["input"]
    output_format = OutputFormat(parameters["output_format"])
    name = file_names.alone(parameters["prompt"], output_format, job_id=job["id"])
    return {
        "id": job["id"],
        "parameters": parameters,
        "file": name if image else None,
        "sha256": image and image["sha256"],
        "url": image and image["url"],
    }


def write_contact_sheet(images: Sequence[DownloadedImage], path: Path) -> None:
    """Save one PNG with a thumbnail of each image above its prompt."""
    columns = min(_COLUMNS, len(images)) or 1
    rows = -(-len(images) // columns)
    width = columns * (_CELL + _MARGIN) + _MARGIN
    height = rows * (_CELL + _CAPTION + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, max(height, _MARGIN)), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        corner = (
            _MARGIN + column * (_CELL + _MARGIN),
            _MARGIN + row * (_CELL + _CAPTION + _MARGIN),
        )
        _paste(sheet, image, corner)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())


def _paste(sheet: Image.Image, image: DownloadedImage, corner: tuple[int, int]) -> None:
    with Image.open(image.file) as original:
        thumbnail = original.convert("RGB")
        thumbnail.thumbnail((_CELL, _CELL), Image.Resampling.LANCZOS)
    sheet.paste(thumbnail, corner)
    parameters = image.parameters
    facts = f"{parameters['num_inference_steps']} steps, guidance {parameters['guidance_scale']:g}"
    caption = f"{_shortened(parameters['prompt'])}\n{facts}, seed {parameters['seed']}"
    below = (corner[0], corner[1] + _CELL + 3)
    ImageDraw.Draw(sheet).text(below, caption, fill="#333", font=ImageFont.load_default(11))


def _shortened(prompt: str) -> str:
    return prompt if len(prompt) <= _CAPTION_CHARS else prompt[: _CAPTION_CHARS - 2] + "…"


def _sha256(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()
