"""Composition: the contents of an image before it has pixels."""

from dataclasses import dataclass
from typing import Final

MAX_PLACED: Final = 4

#: Color asked: target hue in degrees (None: none), then saturation *, value *, value +.
RECOLORINGS: Final[dict[str, tuple[float | None, float, float, float]]] = {
    "red": (0, 1.0, 1.0, 0.0),
    "orange": (28, 1.0, 1.0, 0.0),
    "yellow": (50, 1.0, 0.9, 0.1),
    "green": (122, 0.9, 0.9, 0.0),
    "teal": (176, 0.95, 0.9, 0.0),
    "blue": (217, 1.0, 1.0, 0.0),
    "purple": (272, 0.85, 0.92, 0.0),
    "pink": (330, 0.62, 0.7, 0.3),
    "brown": (24, 0.9, 0.58, 0.0),
    "black": (None, 0.05, 0.26, 0.02),
    "white": (None, 0.05, 0.35, 0.66),
    "gray": (None, 0.04, 0.75, 0.02),
}


@dataclass(frozen=True)
class Recoloring:
    """`paint` fills a silhouette; else the four numbers turn hue and scale saturation, value."""

    paint: bool
    numbers: tuple[float, float, float, float]
    near: float | None = None  #: degrees: only what has about this hue changes; None: all


@dataclass(frozen=True)
class Placed:
    """One sprite in an image. Centre and size are shares of the image's side."""

    sprite: int
    x: float
    y: float
    size: float
    recoloring: Recoloring | None = None
    casts_shadow: bool = False


@dataclass(frozen=True)
class Backdrop:
    """Background: one color, two in a pattern, or a scene."""

    kind: str = "plain"  #: "plain", "gradient", "dots", "stripes" or "scene"
    first: tuple[float, float, float] = (1.0, 1.0, 1.0)  #: RGB, 0 to 1
    second: tuple[float, float, float] = (1.0, 1.0, 1.0)
    scene: int = 0


@dataclass(frozen=True)
class Composition:
    """Planned image and its caption. `finish` is "none", "pixels", "gray" or "sticker"."""

    caption: str
    backdrop: Backdrop
    placed: tuple[Placed, ...]
    finish: str = "none"
