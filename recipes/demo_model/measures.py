"""Measures of an image's pixels: its colors, numbers, places, positions and things."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from recipes.demo_model.captions import PALETTE
from recipes.demo_model.prompt_sets import BASIC_COLORS, HELD_OUT, Asked
from recipes.demo_model.raster import hue_saturation_value

PixelArray = NDArray[np.uint8]  #: [256, 256, 3]
Mask = NDArray[np.bool_]

_BORDER: Final = 8  #: pixels that are taken to be background
_DIFFERENT: Final = 48  #: of 255 in some channel: a pixel that is not background
_SMALL: Final = 64  #: side of the grid on which things are told apart
_CELL: Final = 256 // _SMALL
_RING: Final = 16  #: side of the grid whose outer cells tell the place
_THUMB: Final = 24  #: side of the thumbnails that tell the thing
#: Where a hue is called something else, in degrees; brown is a dark one of the second and third.
_HUE_EDGES: Final = (14, 40, 66, 160, 194, 246, 296, 345)
_HUE_NAMES: Final = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "red")


@dataclass(frozen=True, eq=False)
class References:
    """References learned from composed images, by which places and things are recognized."""

    places: tuple[str, ...]
    weights: NDArray[np.float64]  #: [features + 1, places], of a linear classifier
    things: tuple[str, ...]  #: one for each thumbnail
    thumbnails: NDArray[np.float32]  #: [sprites, _THUMB * _THUMB * 3]


def is_right(picture: PixelArray, one: Asked, references: References | None) -> bool:
    """Return whether the image shows what the prompt asks, by this score.

    Only places and things want a references.
    """
    if one.score in ("color", HELD_OUT):
        return dominant_color(picture) == one.expected
    if one.score == "background":
        return background_color(picture) == one.expected
    if one.score == "place":
        assert references is not None
        return place(picture, references) == one.expected
    if one.score == "count":
        return count(picture) == int(one.expected)
    if one.score == "position":
        return relation(picture, one.colors) == one.expected
    assert references is not None
    return thing(picture, references) == one.expected


# --- colors


def border(picture: PixelArray) -> NDArray[np.float64]:
    """Return the median color of the image's edge, [3]."""
    edge = np.ones(picture.shape[:2], bool)
    edge[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    return np.asarray(np.median(picture[edge], axis=0), np.float64)


def background_color(picture: PixelArray) -> str:
    """Return the basic color nearest to that of the edge."""
    edge = border(picture)
    return min(BASIC_COLORS, key=lambda name: float(np.square(edge - PALETTE[name]).sum()))


def foreground(picture: PixelArray) -> Mask:
    """Mask the pixels that differ from the edge, [256, 256]."""
    return np.asarray(np.abs(picture - border(picture)).max(-1) > _DIFFERENT)


def dominant_color(picture: PixelArray) -> str | None:
    """Return the color of most of the foreground, or None without a foreground."""
    mask = foreground(picture)
    if mask.mean() < 0.01:
        return None
    names, counts = np.unique(color_names(picture[mask]), return_counts=True)
    return str(names[counts.argmax()])


def color_names(colors: NDArray[np.uint8]) -> NDArray[np.str_]:
    """Return the basic color of each of [n, 3], by hue, saturation and value."""
    hue, saturation, value = hue_saturation_value(colors.T / 255)
    names = np.array(_HUE_NAMES)[np.digitize(hue, _HUE_EDGES)]
    warm = (hue < 48) | (hue > 345)
    names[warm & (value < 0.66) & (saturation > 0.3) & (hue > 8) & (hue < 48)] = "brown"
    names[((hue > 310) | (hue < 12)) & (value > 0.75) & (saturation < 0.6)] = "pink"
    pale = saturation < 0.15
    names[pale] = np.where(value[pale] > 0.86, "white", "gray")
    names[value < 0.34] = "black"
    return names


# --- numbers and positions


def count(picture: PixelArray) -> int:
    """Separate things before a plain background; crumbs are not things."""
    share = foreground(picture).reshape(_SMALL, _CELL, _SMALL, _CELL).mean((1, 3))
    sizes = [len(cells) for cells in _components(share > 0.25)]
    return sum(size >= max(12, 0.3 * max(sizes)) for size in sizes)


def _components(mask: Mask) -> list[list[tuple[int, int]]]:
    """Return the connected regions of a small mask, diagonals included."""
    waiting = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    regions = []
    while waiting:
        region = [waiting.pop()]
        for y, x in region:  # grows while it is walked
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & waiting
            waiting -= near
            region.extend(near)
        regions.append(region)
    return regions


def relation(picture: PixelArray, colors: tuple[str, ...]) -> str | None:
    """Return where the first color is, seen from the second; None if one is missing."""
    mask = foreground(picture)
    spots = np.argwhere(mask)
    if not len(spots):
        return None
    names = color_names(picture[mask])
    centers = []
    for color in colors:
        of_color = names == color
        if of_color.sum() < 0.005 * mask.size:
            return None
        centers.append(np.median(spots[of_color], axis=0))
    down, right = centers[0] - centers[1]
    if max(abs(down), abs(right)) < 0.12 * len(mask):
        return None
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "below" if down > 0 else "above"


# --- places and things


def learn(
    scenes: list[PixelArray], places: list[str], sprites: NDArray[np.uint8], things: list[str]
) -> References:
    """From composed scenes whose places are known, and from every sprite [n, 4, 256, 256].

    The places' classifier is a ridge regression onto one-hot targets, in closed form.
    """
    names = tuple(dict.fromkeys(places))
    features = np.stack([_outskirts(scene) for scene in scenes])
    targets = np.array([[place == name for name in names] for place in places], float)
    ridge = features.T @ features + 1e-2 * len(features) * np.eye(features.shape[1])
    weights = np.linalg.solve(ridge, features.T @ targets)
    return References(names, weights, tuple(things), np.stack([_sprite_thumb(s) for s in sprites]))


def place(picture: PixelArray, references: References) -> str:
    return references.places[int((_outskirts(picture) @ references.weights).argmax())]


def _outskirts(picture: PixelArray) -> NDArray[np.float64]:
    """Colors of the outer cells, where things seldom are, their squares, and a constant."""
    cell = 256 // _RING
    cells = picture.reshape(_RING, cell, _RING, cell, 3).mean((1, 3)) / 255
    outer = np.ones((_RING, _RING), bool)
    outer[5:14, 4:12] = False
    colors = cells[outer].ravel() - 0.5
    return np.concatenate([colors, colors**2, [1.0]])


def thing(picture: PixelArray, references: References) -> str:
    """Return the thing whose sprite, in any style, is nearest to the foreground."""
    thumb = _thumbnail(picture, foreground(picture))
    return references.things[int(np.square(references.thumbnails - thumb).sum(1).argmin())]


def _sprite_thumb(sprite: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the thumbnail of a premultiplied sprite on white."""
    on_white = sprite[:3] + (255 - sprite[3:])
    return _thumbnail(on_white.transpose(1, 2, 0), sprite[3] > 100)


def _thumbnail(picture: PixelArray, mask: Mask) -> NDArray[np.float32]:
    """Return the smallest square around the foreground as [_THUMB * _THUMB * 3], 0 to 1."""
    rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
    if not len(rows):
        return np.ones(_THUMB * _THUMB * 3, np.float32)
    side = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    top, left = (rows[0] + rows[-1] + 1 - side) // 2, (columns[0] + columns[-1] + 1 - side) // 2
    padded = np.pad(picture, ((side, side), (side, side), (0, 0)), constant_values=255)
    square = padded[top + side : top + 2 * side, left + side : left + 2 * side] / 255
    edges = np.linspace(0, side, _THUMB + 1).round().astype(int)
    sums = np.add.reduceat(np.add.reduceat(square, edges[:-1], 0), edges[:-1], 1)
    steps = np.maximum(np.diff(edges), 1)
    areas = steps[:, None, None] * steps[None, :, None]
    return np.asarray(sums / areas, np.float32).ravel()
