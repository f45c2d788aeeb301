"""Four shapes in four colors: a data set to try every step on, in seconds and without packages."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from recipes.demo_model.prompt_sets import Asked
from recipes.demo_model.raster import SIDE, Rasters, SpriteFacts
from recipes.demo_model.scenes import SCENES, VARIANTS
from recipes.demo_model.things import Thing

_HUES: Final = {"red": 0.0, "yellow": 50.0, "green": 115.0, "blue": 213.0}
_COLORS: Final = {
    "red": (220, 38, 38),
    "yellow": (250, 212, 50),
    "green": (52, 168, 70),
    "blue": (45, 105, 228),
}
#: One prompt for each score.
TOY_PROMPTS: Final = (
    Asked("color", "a blue ball", "blue", ("ball",), ("blue",)),
    Asked("background", "a box on a green background", "green", ("box",)),
    Asked("place", "a ball on the beach", "beach", ("ball",)),
    Asked("count", "three boxes", "3", ("box",)),
    Asked("position", "a ball above a wedge", "above", ("ball", "wedge"), ("red", "blue")),
    Asked("thing", "a wedge", "wedge", ("wedge",)),
)
_SHAPES: Final = ("ball", "box", "ring", "wedge")


def toy_rasters() -> Rasters:
    """Every shape in its own color, flat and as a silhouette."""
    names = list(zip(_SHAPES, _COLORS, strict=True))
    things = [Thing(shape, "Objects", "", (), ("toy",)) for shape, _ in names]
    facts, sprites = [], []
    for shape, color in names:
        facts.append(SpriteFacts(shape, "flat", 0.97, 0.97, color, _HUES[color]))
        sprites.append(_painted(_mask(shape), _COLORS[color]))
        facts.append(SpriteFacts(shape, "silhouette", 0.97, 0.97, "black", None))
        sprites.append(_painted(_mask(shape), (0, 0, 0)))
    places = len(SCENES) * VARIANTS
    return Rasters(things, facts, np.stack(sprites), _scenes(places), [(200.0, 240.0)] * places)


def _mask(shape: str) -> NDArray[np.bool_]:
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE - 0.5
    distance = np.hypot(x, y)
    masks = {
        "ball": distance < 0.48,
        "box": np.maximum(abs(x), abs(y)) < 0.48,
        "ring": (distance < 0.48) & (distance > 0.28),
        "wedge": (abs(x) < (y + 0.48) / 2) & (y < 0.48),
    }
    return np.asarray(masks[shape])


def _painted(mask: NDArray[np.bool_], color: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Premultiplied RGBA [4, SIDE, SIDE]."""
    return (np.array([*color, 255])[:, None, None] * mask).astype(np.uint8)


def _scenes(count: int) -> NDArray[np.uint8]:
    """Return a mosaic of 8 by 8 colors for each place, the same for every variant."""
    tiles = np.random.default_rng(0).integers(0, 256, (count // VARIANTS, 3, 8, 8), np.uint8)
    return tiles.repeat(SIDE // 8, 2).repeat(SIDE // 8, 3).repeat(VARIANTS, 0)
