"""Image files that carry their parameters: encoding, and reading the parameters back."""

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

from PIL import Image, PngImagePlugin

from darkroom.status import OutputFormat

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from darkroom.generation.params import GenerationParams  # pydantic: the CLI only reads files

METADATA_KEY: Final = "darkroom"
CONTENT_TYPES: Final = {
    OutputFormat.PNG: "image/png",
    OutputFormat.JPEG: "image/jpeg",
    OutputFormat.WEBP: "image/webp",
}
_EXIF_IFD: Final = 0x8769
_USER_COMMENT: Final = 0x9286
_UNICODE: Final = b"UNICODE\0"  # EXIF 2.3, table 6: the character code that leads a UserComment


def encode(
    pixels: "npt.NDArray[np.uint8]", params: "GenerationParams", *, job_id: str, revision: str
) -> bytes:
    """Return `pixels` [height, width, 3] as a file that contains its parameters."""
    image = Image.fromarray(pixels)
    metadata = json.dumps(
        {"id": job_id, "revision": revision, **params.model_dump(mode="json")}, sort_keys=True
    )
    buffer = io.BytesIO()
    match params.output_format:
        case OutputFormat.PNG:
            text = PngImagePlugin.PngInfo()
            text.add_itxt(METADATA_KEY, metadata)
            image.save(buffer, "PNG", pnginfo=text, compress_level=3)
        case OutputFormat.JPEG:
            image.save(buffer, "JPEG", quality=92, exif=_exif(metadata))
        case OutputFormat.WEBP:
            image.save(buffer, "WEBP", quality=92, method=2, exif=_exif(metadata))
    return buffer.getvalue()


def _exif(metadata: str) -> Image.Exif:
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _UNICODE + metadata.encode("utf-16-le")
    return exif


def read_parameters(path: Path) -> dict[str, object] | None:
    """Return the parameters that `encode` wrote into the file; None if it has none.

    The file may come from anywhere: validate the values before use.
    """
    with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
        metadata = getattr(image, "text", {}).get(METADATA_KEY) or _user_comment(image)
    if metadata is None:
        return None
    try:
        parameters = json.loads(metadata)
    except ValueError:
        return None
    return parameters if isinstance(parameters, dict) else None


def _user_comment(image: Image.Image) -> str | None:
    comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if not isinstance(comment, bytes) or not comment.startswith(_UNICODE):
        return None
    return comment.removeprefix(_UNICODE).decode("utf-16-le", "replace")
