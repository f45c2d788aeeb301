"""Parts of scenes: skies, hills, trees and houses, each a piece of SVG."""

import math
from collections.abc import Iterable
from random import Random
from typing import Final

RGB = tuple[int, int, int]
_SUN: Final = "#ffe14d"


def shade(r: Random, color: RGB, spread: float = 12) -> str:
    """Return that color or one near it."""
    near = (max(0, min(255, int(channel + r.uniform(-spread, spread)))) for channel in color)
    return "#{:02x}{:02x}{:02x}".format(*near)


def rect(x: float, y: float, width: float, height: float, fill: str, more: str = "") -> str:
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}" '
        f'fill="{fill}" {more}/>'
    )


def circle(x: float, y: float, radius: float, fill: str, more: str = "") -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{fill}" {more}/>'


def line(path: str, color: str, width: float, more: str = "") -> str:
    return f'<path d="{path}" stroke="{color}" stroke-width="{width}" fill="none" {more}/>'


def polygon(points: Iterable[tuple[float, float]], fill: str, more: str = "") -> str:
    listed = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polygon points="{listed}" fill="{fill}" {more}/>'


def sky(r: Random, top: RGB, bottom: RGB) -> str:
    return (
        '<defs><linearGradient id="sky" x1="0" y1="0" x2="0" y2="1">'
        f'<stop offset="0" stop-color="{shade(r, top)}"/>'
        f'<stop offset="1" stop-color="{shade(r, bottom)}"/></linearGradient></defs>'
        + rect(0, 0, 256, 256, "url(#sky)")
    )


def hill(r: Random, y: float, swing: float, fill: str, waves: float = 2) -> str:
    """Everything below a wavy line."""
    phase, training_config = r.uniform(0, 6.3), r.uniform(0.6, 1.4) * waves
    edge = [(x, y + swing * math.sin(phase + training_config * x / 81)) for x in range(0, 257, 8)]
    return polygon([(0, 256), *edge, (256, 256)], fill)


def clouds(r: Random, count: int, top: float, bottom: float, fill: str = "#ffffff") -> str:
    return "".join(cloud(r, top, bottom, fill) for _ in range(count))


def cloud(r: Random, top: float, bottom: float, fill: str) -> str:
    x, y, size = r.uniform(0, 256), r.uniform(top, bottom), r.uniform(0.6, 1.4)
    puffs = ((-20, 4, 14), (0, -2, 19), (20, 4, 15), (0, 7, 24))
    ellipses = (
        f'<ellipse cx="{x + dx * size:.0f}" cy="{y + dy * size:.0f}" '
        f'rx="{radius * size:.0f}" ry="{radius * size * 0.7:.0f}"/>'
        for dx, dy, radius in puffs
    )
    return f'<g fill="{fill}" fill-opacity="{r.uniform(0.7, 1):.2f}">{"".join(ellipses)}</g>'


def sun(x: float, y: float, radius: float, fill: str = _SUN) -> str:
    return circle(x, y, radius * 1.35, fill, 'fill-opacity=".3"') + circle(x, y, radius, fill)


def somewhere_up(r: Random) -> tuple[float, float]:
    return r.uniform(30, 226), r.uniform(28, 60)


def moon(r: Random, radius: float) -> str:
    x, y = somewhere_up(r)
    craters = ((-0.3, -0.2, 0.18), (0.3, 0.3, 0.13))
    return circle(x, y, radius, "#fdf3c4") + "".join(
        circle(x + dx * radius, y + dy * radius, size * radius, "#e8dca0")
        for dx, dy, size in craters
    )


def stars(r: Random, count: int, bottom: float = 256) -> str:
    return "".join(
        circle(
            r.uniform(0, 256),
            r.uniform(0, bottom),
            r.choice((1, 1.3, 1.8, 2.6)),
            "#fff",
            f'fill-opacity="{r.uniform(0.5, 1):.2f}"',
        )
        for _ in range(count)
    )


def pine(x: float, y: float, height: float, fill: str) -> str:
    trunk = rect(x - height * 0.05, y - height * 0.15, height * 0.1, height * 0.15, "#6b4423")
    layers = ((0.3, 0.12, 0.55), (0.24, 0.38, 0.78), (0.17, 0.6, 1))
    return trunk + "".join(
        polygon(
            [(x - height * w, y - height * low), (x, y - height * high),
             (x + height * w, y - height * low)],
            fill,
        )
        for w, low, high in layers
    )  # fmt: skip


def round_tree(x: float, y: float, height: float, fill: str) -> str:
    trunk = rect(x - height * 0.06, y - height * 0.45, height * 0.12, height * 0.45, "#7a4e2a")
    return trunk + circle(x, y - height * 0.65, height * 0.33, fill)


def mountain(x: float, y: float, width: float, height: float, fill: str, *, snowy: bool) -> str:
    body = polygon([(x - width, y), (x, y - height), (x + width, y)], fill)
    if not snowy:
        return body
    edge = ((-0.3, 0.7), (0, 1), (0.3, 0.7), (0.1, 0.62), (-0.08, 0.66))
    return body + polygon([(x + dx * width, y - dy * height) for dx, dy in edge], "#fff")


def houses(r: Random, y: float, *, lit: bool) -> str:
    drawn, x = [], -10.0
    while x < 256:
        width, height = r.uniform(22, 46), r.uniform(50, 130)
        wall = shade(r, (34, 40, 74) if lit else (128, 140, 165), 16)
        drawn.append(rect(x, y - height, width, height, wall))
        for window_y in range(int(y - height + 8), int(y - 10), 14):
            for window_x in range(int(x + 5), int(x + width - 6), 11):
                if r.random() < 0.7:
                    glass = r.choice(("#ffe27a", "#ffe27a", "#3d4678")) if lit else "#d8e6f5"
                    drawn.append(rect(window_x, window_y, 5, 7, glass))
        x += width + r.uniform(-2, 6)
    return "".join(drawn)


def street(r: Random, asphalt: RGB, marking: str) -> str:
    middle = line("M0,228 H256", marking, 4, 'stroke-dasharray="22 16"')
    return rect(0, 198, 256, 60, shade(r, asphalt, 6)) + middle


def flower(x: float, y: float, size: float, fill: str) -> str:
    petals = (
        circle(x + size * math.cos(a * 1.2566), y + size * math.sin(a * 1.2566), size * 0.8, fill)
        for a in range(5)
    )
    return "".join(petals) + circle(x, y, size * 0.7, "#f6a821")
