"""Sprites and scenes as pixels, with what the composer must know of each sprite."""

import io
import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from recipes.demo_model import archive
from recipes.demo_model.scenes import SCENES, VARIANTS, scene_svg
from recipes.demo_model.things import Sprite, Thing

SIDE: Final = 256  #: pixels of an image, and of a sprite's frame
_FILLED: Final = 248  #: the longer side of what is drawn in that frame
_MAX_RESVG: Final = 640
HUE_REACH: Final = 35  #: degrees around a thing's main hue that take another color with it
_MAIN_SHARE: Final = 0.5  #: of what is drawn must have the main hue
_VERSION: Final = 2  # of the facts: a cache of older ones is left alone

#: Hues in degrees that the eight hue names stand for.
_HUES: Final = {
    "red": 0,
    "orange": 28,
    "yellow": 50,
    "green": 115,
    "teal": 175,
    "blue": 213,
    "purple": 272,
    "pink": 325,
}


@dataclass(frozen=True)
class SpriteFacts:
    """Facts of a sprite that the composer uses instead of its pixels."""

    thing: str
    style: str
    height: float  #: of what is drawn, as a share of the frame
    width: float
    color: str | None  #: the word for it, where one word does
    hue: float | None  #: degrees, of a thing that another color would suit
    has_other_hues: bool = False  #: which stay when it takes another color: a rose's leaves


@dataclass(frozen=True, eq=False)
class Rasters:
    """Pixels and facts of all sprites. They are premultiplied RGBA."""

    things: list[Thing]
    facts: list[SpriteFacts]
    sprites: NDArray[np.uint8]  #: [sprites, 4, SIDE, SIDE]
    scenes: NDArray[np.uint8]  #: [places * VARIANTS, 3, SIDE, SIDE], place by place
    grounds: list[tuple[float, float] | None]  #: where feet stand, in pixels from the top


def rasterise(data_set: Path, cache: Path, *, processes: int) -> Rasters:
    """Pixels for a data set, drawn once and kept in `cache`."""
    contents = archive.read(data_set)
    folder = cache / f"{archive.digest(contents)[:12]}-{_VERSION}"
    if not (folder / "facts.json").exists():
        _draw_all(contents.sprites, folder, processes)
    facts = json.loads((folder / "facts.json").read_text("utf-8"))
    return Rasters(
        things=contents.things,
        facts=[SpriteFacts(**row) for row in facts],
        sprites=np.load(folder / "sprites.npy", mmap_mode="r"),
        scenes=np.load(folder / "scenes.npy", mmap_mode="r"),
        grounds=[scene_svg(index)[1] for index in range(len(SCENES) * VARIANTS)],
    )


def _draw_all(sprites: Sequence[Sprite], folder: Path, processes: int) -> None:
    """Write the pixels, then the facts: their presence says that the pixels are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        drawn = pool.map(draw_sprite, sprites, chunksize=32)
        scenes = pool.map(_draw_scene, range(len(SCENES) * VARIANTS), chunksize=8)
    np.save(folder / "sprites.npy", np.stack([pixels for pixels, _ in drawn]))
    np.save(folder / "scenes.npy", np.stack(scenes))
    facts = [asdict(fact) for _, fact in drawn]
    unfinished = folder / "facts.tmp"
    unfinished.write_text(json.dumps(facts), "utf-8")
    unfinished.replace(folder / "facts.json")


def draw_sprite(sprite: Sprite) -> tuple[NDArray[np.uint8], SpriteFacts]:
    """Premultiplied RGBA [4, SIDE, SIDE], cropped, centred and scaled to the frame; its facts."""
    pixels = _trimmed(_decoded(sprite))
    height, width = pixels.shape[:2]
    scale = _FILLED / max(height, width)
    new_height, new_width = (max(1, round(side * scale)) for side in (height, width))
    resample = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    planes = [
        np.asarray(Image.fromarray(pixels[..., plane]).resize((new_width, new_height), resample))
        for plane in range(4)
    ]
    top, left = (SIDE - new_height) // 2, (SIDE - new_width) // 2
    framed = np.zeros((4, SIDE, SIDE), np.uint8)
    framed[:, top : top + new_height, left : left + new_width] = np.stack(planes)
    np.minimum(framed[:3], framed[3:], out=framed[:3])  # resampling may ring above the alpha
    color, hue, has_other_hues = _described(framed)
    return framed, SpriteFacts(
        sprite.thing, sprite.style, new_height / SIDE, new_width / SIDE, color, hue, has_other_hues
    )


def _decoded(sprite: Sprite) -> Image.Image:
    if sprite.kind == "webp":
        return Image.open(io.BytesIO(sprite.content)).convert("RGBA")
    import resvg_py  # only who makes images from the packages needs it

    png = resvg_py.svg_to_bytes(
        svg_string=sprite.content.decode(), width=_MAX_RESVG, skip_system_fonts=True
    )
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def _trimmed(picture: Image.Image) -> NDArray[np.uint8]:
    """Premultiplied [h, w, 4] without empty borders."""
    pixels = np.asarray(picture).astype(np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    visible = pixels[..., 3] > 8
    if not visible.any():
        return np.zeros((1, 1, 4), np.uint8)
    rows, columns = np.where(visible.any(1))[0], np.where(visible.any(0))[0]
    trimmed = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.ascontiguousarray(np.round(trimmed).clip(0, 255).astype(np.uint8))


def _described(framed: NDArray[np.uint8]) -> tuple[str | None, float | None, bool]:
    """(word for its color, hue in degrees if another color would suit it, has it other hues)."""
    small = framed.reshape(4, SIDE // 4, 4, SIDE // 4, 4).mean((2, 4)) / 255
    opaque = small[3] > 0.5
    if opaque.sum() < 30:
        return None, None, False
    colors = (small[:3] / np.maximum(small[3:], 1e-6))[:, opaque].clip(0, 1)
    hue, saturation, value = hue_saturation_value(colors)
    colored = (saturation > 0.3) & (value > 0.25)
    if colored.mean() < 0.08:
        return _gray_word(float(colors.mean())), None, False
    if colored.mean() <= 0.35:
        return None, None, False
    weight = (saturation * value)[colored]
    turns = np.exp(1j * np.deg2rad(hue[colored]))
    mean_hue = float(np.rad2deg(np.angle((weight * turns).sum())) % 360)
    away = np.abs((hue[colored] - mean_hue + 180) % 360 - 180)
    agreeing = float((weight * (away < 28)).sum() / weight.sum())
    recolorable = mean_hue if colored.mean() > 0.45 and agreeing > 0.82 else None
    if recolorable is None:
        recolorable = _main_hue(hue, np.where(colored, saturation * value, 0.0))
        return None, recolorable, recolorable is not None
    if agreeing <= 0.8 or colored.mean() <= 0.5:
        return None, recolorable, False
    word = min(_HUES, key=lambda name: abs((_HUES[name] - mean_hue + 180) % 360 - 180))
    is_dull = np.average(value[colored], weights=weight) < 0.72
    if word in ("orange", "yellow", "red") and is_dull:
        word = "brown"
    return word, recolorable, False


def _main_hue(hue: NDArray[np.float64], weight: NDArray[np.float64]) -> float | None:
    """Return the hue in degrees of most of a thing, or None if no hue has half of it."""
    candidates = np.arange(0, 360, 5)
    away = np.abs((hue - candidates[:, None] + 180) % 360 - 180)
    best = int(((away < HUE_REACH) * weight).sum(1).argmax())
    near = (away[best] < HUE_REACH) & (weight > 0)
    if near.mean() < _MAIN_SHARE:
        return None
    turns = np.exp(1j * np.deg2rad(hue[near]))
    return float(np.rad2deg(np.angle((weight[near] * turns).sum())) % 360)


def _gray_word(lightness: float) -> str | None:
    """None between the words, where people would disagree."""
    if lightness < 0.25:
        return "black"
    if lightness > 0.85:
        return "white"
    return "gray" if 0.35 < lightness <= 0.75 else None


def hue_saturation_value(
    colors: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Hue in degrees, saturation and value of RGB colors [3, ...] between 0 and 1."""
    red, green, blue = colors
    value, least = colors.max(0), colors.min(0)
    spread = np.maximum(value - least, 1e-6)
    sector = np.where(
        value == red,
        ((green - blue) / spread) % 6,
        np.where(value == green, (blue - red) / spread + 2, (red - green) / spread + 4),
    )
    saturation = (value - least) / np.maximum(value, 1e-6)
    return np.asarray(sector * 60), np.asarray(saturation), np.asarray(value)


def _draw_scene(index: int) -> NDArray[np.uint8]:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=scene_svg(index)[0], width=SIDE, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))
