"""Scenes: the places a thing can be in, each a small, randomly varied SVG drawing."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

from recipes.demo_model.drawing_parts import (
    circle,
    clouds,
    flower,
    hill,
    houses,
    line,
    moon,
    mountain,
    pine,
    polygon,
    rect,
    round_tree,
    shade,
    sky,
    somewhere_up,
    stars,
    street,
    sun,
)

Ground = tuple[float, float] | None  #: pixels from the top between which feet stand; None: afloat
VARIANTS: Final = 40  #: drawings of each place

_PALE_SKY: Final = (214, 240, 255)
_BLUE_SKY: Final = (115, 192, 250)
_RAINBOW: Final = ("#e53935", "#fb8c00", "#fdd835", "#43a047", "#1e88e5", "#8e24aa")


@dataclass(frozen=True)
class Scene:
    """How a place is drawn, and how a caption says that a thing is there."""

    draw: Callable[[Random], tuple[str, Ground]]
    phrases: tuple[str, ...]
    alone: tuple[str, ...]  #: what it is called without a thing in it


def scene_svg(index: int) -> tuple[str, Ground]:
    """Drawing `index` of len(SCENES) * VARIANTS, place by place, and its ground."""
    scene = list(SCENES.values())[index // VARIANTS]
    body, ground = scene.draw(Random(1000 + index))
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 256 256">{body}</svg>'
    return svg, ground


def _beach(r: Random) -> tuple[str, Ground]:
    horizon, shore = r.uniform(105, 130), r.uniform(165, 185)
    drawn = sky(r, (110, 190, 250), (205, 238, 255))
    drawn += sun(*somewhere_up(r), r.uniform(16, 24)) if r.random() < 0.7 else ""
    drawn += clouds(r, r.randint(0, 3), 20, 70)
    drawn += rect(0, horizon, 256, 160, shade(r, (40, 150, 215)))
    drawn += hill(r, shore - 6, 4, "#e8f8ff") + hill(r, shore, 4, shade(r, (244, 218, 150)))
    return drawn, (195, 240)


def _ocean(r: Random) -> tuple[str, Ground]:
    top = r.uniform(130, 150)
    drawn = sky(r, _BLUE_SKY, _PALE_SKY) + clouds(r, r.randint(1, 3), 20, 90)
    for wave in range(5):
        water = shade(r, (30 + 4 * wave, 130 - 12 * wave, 210 - 14 * wave), 8)
        drawn += hill(r, top + wave * 22, 5, water, 5)
    return drawn, (165, 215)


def _underwater(r: Random) -> tuple[str, Ground]:
    drawn = sky(r, (60, 180, 225), (8, 50, 120))
    for _ in range(4):
        x, drift = r.uniform(0, 240), r.uniform(-60, 60)
        beam = [(x, 0), (x + 18, 0), (x + drift + 50, 256), (x + drift, 256)]
        drawn += polygon(beam, "#fff", 'fill-opacity=".08"')
    drawn += hill(r, 236, 7, shade(r, (200, 180, 120)), 3)
    for _ in range(r.randint(2, 6)):
        bend, back = r.uniform(-14, 14), r.uniform(-14, 14)
        weed = f"M{r.uniform(5, 250):.0f},250 q{bend:.0f},-25 0,-50 q{back:.0f},-20 2,-40"
        drawn += line(weed, shade(r, (30, 140, 80)), 6)
    for _ in range(r.randint(6, 16)):
        outline = 'stroke="#dff6ff" stroke-width="1.5"'
        drawn += circle(r.uniform(0, 256), r.uniform(0, 220), r.uniform(2, 7), "none", outline)
    return drawn, None


def _night(r: Random) -> tuple[str, Ground]:
    drawn = sky(r, (10, 16, 52), (40, 52, 112)) + stars(r, r.randint(25, 60), 190)
    drawn += moon(r, r.uniform(16, 26)) if r.random() < 0.75 else ""
    return drawn + hill(r, r.uniform(195, 215), 10, shade(r, (14, 44, 40), 8)), (205, 240)


def _space(r: Random) -> tuple[str, Ground]:
    drawn = rect(0, 0, 256, 256, shade(r, (8, 6, 24), 8))
    for _ in range(r.randint(1, 3)):
        fog = r.choice(("#5b2a8c", "#1d3f8f", "#8a2a6a"))
        x, y = r.uniform(0, 256), r.uniform(0, 256)
        radii = f'rx="{r.uniform(50, 110):.0f}" ry="{r.uniform(30, 70):.0f}"'
        drawn += f'<ellipse cx="{x:.0f}" cy="{y:.0f}" {radii} fill="{fog}" fill-opacity=".28"/>'
    drawn += stars(r, r.randint(50, 100))
    for _ in range(r.randint(0, 2)):
        hue = r.choice(((210, 120, 70), (90, 150, 210), (200, 180, 120), (140, 90, 170)))
        drawn += circle(r.uniform(20, 236), r.uniform(20, 236), r.uniform(10, 26), shade(r, hue))
    return drawn, None


def _meadow(r: Random) -> tuple[str, Ground]:
    drawn = sky(r, _BLUE_SKY, _PALE_SKY)
    drawn += sun(*somewhere_up(r), 20) if r.random() < 0.5 else ""
    drawn += clouds(r, r.randint(1, 3), 20, 80)
    y = r.uniform(150, 175)
    drawn += hill(r, y - 16, 14, shade(r, (120, 200, 95)))
    drawn += hill(r, y, 8, shade(r, (84, 176, 66)))
    for _ in range(r.randint(0, 14)):
        petal = r.choice(("#fff", "#ffd23e", "#ff8fb5", "#e85b5b"))
        drawn += circle(r.uniform(0, 256), r.uniform(y + 20, 254), 3, petal)
    return drawn, (190, 238)


def _snow(r: Random) -> tuple[str, Ground]:
    drawn = sky(r, (150, 190, 225), (225, 238, 250))
    for _ in range(r.randint(0, 4)):
        needles = shade(r, (60, 110, 100))
        drawn += pine(r.uniform(0, 256), r.uniform(170, 185), r.uniform(50, 100), needles)
    drawn += hill(r, r.uniform(165, 180), 9, "#f4f9ff")
    for _ in range(r.randint(30, 70)):
        drawn += circle(r.uniform(0, 256), r.uniform(0, 250), r.uniform(1.5, 4), "#fff")
    return drawn, (195, 238)


def _desert(r: Random) -> tuple[str, Ground]:
    drawn = sky(r, (250, 190, 110), (255, 232, 180))
    drawn += sun(*somewhere_up(r), r.uniform(18, 26), "#fff2b0")
    drawn += hill(r, 150, 16, shade(r, (228, 172, 96)))
    drawn += hill(r, 182, 12, shade(r, (214, 150, 72)))
    for _ in range(r.randint(0, 2)):
        x, y = r.uniform(15, 240), r.uniform(160, 190)
        cactus = (f"M{x:.0f},{y:.0f} v-42 M{x:.0f},{y - 16:.0f} h-14 v-12 "
                  f"M{x:.0f},{y - 22:.0f} h13 v-12")  # fmt: skip
        drawn += line(cactus, "#3f8a4a", 9, 'stroke-linecap="round"')
    return drawn, (200, 238)


def _forest(r: Random) -> tuple[str, Ground]:
    drawn = sky(r, (190, 225, 235), (225, 240, 220))
    for _ in range(r.randint(7, 11)):
        x, y, height = r.uniform(-5, 261), r.uniform(150, 190), r.uniform(80, 150)
        if r.random() < 0.7:
            drawn += pine(x, y, height, shade(r, (34, 110, 66)))
        else:
            drawn += round_tree(x, y, height, shade(r, (70, 150, 70)))
    return drawn + hill(r, 186, 6, shade(r, (76, 140, 62))), (200, 238)


def _autumn(r: Random) -> tuple[str, Ground]:
    drawn = sky(r, (240, 220, 190), (250, 240, 220))
    for _ in range(r.randint(7, 11)):
        x, y, height = r.uniform(-5, 261), r.uniform(150, 190), r.uniform(80, 150)
        leaves = r.choice(((230, 120, 40), (240, 180, 50), (200, 70, 40)))
        drawn += round_tree(x, y, height, shade(r, leaves))
    return drawn + hill(r, 186, 6, shade(r, (196, 140, 70))), (200, 238)


def _mountains(r: Random) -> tuple[str, Ground]:
    drawn = sky(r, (120, 186, 240), (220, 238, 250)) + clouds(r, r.randint(0, 3), 20, 70)
    for _ in range(r.randint(2, 4)):
        rock = shade(r, (110, 118, 140))
        place = (r.uniform(0, 256), 185, r.uniform(70, 120), r.uniform(80, 140))
        drawn += mountain(*place, rock, snowy=r.random() < 0.8)
    return drawn + hill(r, 182, 8, shade(r, (96, 170, 84))), (198, 238)


def _city(r: Random) -> tuple[str, Ground]:
    drawn = sky(r, (130, 196, 245), (222, 240, 252)) + clouds(r, r.randint(0, 2), 15, 50)
    return drawn + houses(r, 200, lit=False) + street(r, (96, 98, 106), "#f6e27a"), (208, 244)


def _city_at_night(r: Random) -> tuple[str, Ground]:
    drawn = sky(r, (12, 14, 46), (52, 44, 104)) + stars(r, 25, 110)
    drawn += moon(r, 16) if r.random() < 0.6 else ""
    return drawn + houses(r, 200, lit=True) + street(r, (40, 42, 56), "#e0c860"), (208, 244)


def _sunset(r: Random) -> tuple[str, Ground]:
    y = r.uniform(150, 172)
    drawn = sky(r, (92, 50, 130), (255, 150, 70))
    drawn += sun(r.uniform(60, 196), y - r.uniform(0, 26), r.uniform(22, 34), "#ffd45c")
    if r.random() < 0.5:
        return drawn + hill(r, y, 12, shade(r, (52, 30, 62), 8)), (196, 238)
    drawn += hill(r, y, 5, shade(r, (64, 40, 96)), 4)
    for glint in range(5):
        width = r.uniform(20, 70)
        drawn += rect(r.uniform(40, 190), y + 12 + 13 * glint, width, 3, "#ffc46a")
    return drawn, (196, 238)


def _rain(r: Random) -> tuple[str, Ground]:
    drawn = sky(r, (96, 110, 130), (160, 174, 190)) + clouds(r, 4, 10, 45, "#6d7888")
    drawn += rect(0, 206, 256, 50, shade(r, (92, 104, 112)))
    for _ in range(r.randint(40, 80)):
        drop = f"M{r.uniform(0, 262):.0f},{r.uniform(40, 240):.0f} l-5,16"
        drawn += line(drop, "#cfe6fa", 2)
    return drawn, (212, 244)


def _room(r: Random) -> tuple[str, Ground]:
    walls = ((236, 214, 186), (190, 216, 226), (226, 196, 206), (206, 222, 190), (240, 226, 160))
    floors = ((150, 98, 60), (176, 132, 90), (120, 80, 60))
    drawn = rect(0, 0, 256, 256, shade(r, r.choice(walls)))
    drawn += rect(0, 186, 256, 70, shade(r, r.choice(floors)))
    drawn += rect(0, 180, 256, 7, "#fff", 'fill-opacity=".7"')
    if r.random() < 0.75:
        x = r.uniform(20, 170)
        drawn += rect(x, 34, 66, 78, "#fff")
        drawn += rect(x + 6, 40, 25, 66, "#a5d8f5") + rect(x + 35, 40, 25, 66, "#a5d8f5")
    if r.random() < 0.5:
        rug = shade(r, r.choice(((190, 60, 60), (60, 90, 160), (90, 140, 90))))
        drawn += f'<ellipse cx="128" cy="226" rx="{r.uniform(60, 100):.0f}" ry="18" fill="{rug}"/>'
    return drawn, (208, 240)


def _in_the_sky(r: Random) -> tuple[str, Ground]:
    return sky(r, (84, 168, 245), (190, 228, 255)) + clouds(r, r.randint(4, 8), 15, 245), None


def _road(r: Random) -> tuple[str, Ground]:
    drawn = sky(r, (120, 192, 248), (220, 240, 252)) + clouds(r, r.randint(0, 3), 20, 70)
    drawn += hill(r, 150, 10, shade(r, (110, 190, 90)))
    drawn += rect(0, 188, 256, 56, shade(r, (84, 86, 94))) + rect(0, 244, 256, 12, "#7cc46a")
    return drawn + line("M0,216 H256", "#fff", 5, 'stroke-dasharray="28 20"'), (208, 234)


def _volcano(r: Random) -> tuple[str, Ground]:
    drawn = sky(r, (70, 40, 60), (220, 110, 70))
    rock = shade(r, (74, 56, 58))
    width, height = r.uniform(90, 130), r.uniform(110, 140)
    drawn += mountain(r.uniform(80, 176), 206, width, height, rock, snowy=False)
    middle = r.uniform(90, 166)
    for _ in range(14):
        glow = r.choice(("#ff6a2a", "#ffb03a"))
        drawn += circle(middle + r.uniform(-50, 50), r.uniform(20, 90), r.uniform(3, 8), glow)
    return drawn + hill(r, 202, 6, shade(r, (60, 40, 44), 8)), (208, 240)


def _under_a_rainbow(r: Random) -> tuple[str, Ground]:
    drawn = sky(r, (130, 200, 250), (220, 242, 255)) + clouds(r, 2, 20, 60)
    x, y = r.uniform(100, 156), r.uniform(175, 190)
    for band, color in enumerate(_RAINBOW):
        drawn += circle(x, y, 118 - 8 * band, "none", f'stroke="{color}" stroke-width="8.5"')
    return drawn + hill(r, y - 4, 8, shade(r, (96, 184, 84))), (204, 240)


def _fireworks(r: Random) -> tuple[str, Ground]:
    drawn = sky(r, (10, 10, 40), (34, 30, 80))
    for _ in range(r.randint(3, 6)):
        x, y, radius = r.uniform(20, 236), r.uniform(20, 140), r.uniform(18, 42)
        spark = r.choice(("#ff5a5a", "#ffd23e", "#5ad1ff", "#b57bff", "#6bff8a", "#ff8fd0"))
        for ray in range(12):
            dx, dy = radius * math.cos(ray * 0.5236), radius * math.sin(ray * 0.5236)
            path = f"M{x + 0.3 * dx:.1f},{y + 0.3 * dy:.1f} L{x + dx:.1f},{y + dy:.1f}"
            drawn += line(path, spark, 3, 'stroke-linecap="round"')
    return drawn + rect(0, 216, 256, 40, "#0d1020"), (216, 242)


def _on_stage(r: Random) -> tuple[str, Ground]:
    curtain = r.choice(((150, 24, 34), (90, 30, 110), (30, 50, 120)))
    drawn = rect(0, 0, 256, 256, shade(r, curtain))
    for x in range(0, 256, 24):
        drawn += rect(x, 0, 11, 200, "#000", 'fill-opacity=".14"')
    drawn += rect(0, 194, 256, 62, shade(r, (140, 92, 50)))
    beam = [(r.uniform(90, 166), 0), (40, 216), (216, 216)]
    drawn += polygon(beam, "#fff6c8", 'fill-opacity=".32"')
    return drawn + '<ellipse cx="128" cy="218" rx="90" ry="16" fill="#fff6c8" opacity=".4"/>', (
        212,
        236,
    )


def _garden(r: Random) -> tuple[str, Ground]:
    drawn = sky(r, (130, 200, 250), (222, 242, 252)) + clouds(r, 2, 20, 60)
    drawn += rect(0, 160, 256, 96, shade(r, (96, 182, 78)))
    for x in range(-4, 260, 20):
        post = [(x, 170), (x, 136), (x + 7, 127), (x + 14, 136), (x + 14, 170)]
        drawn += polygon(post, "#fff")
    drawn += rect(0, 146, 256, 6, "#fff")
    for _ in range(r.randint(8, 16)):
        petal = r.choice(("#e84a5f", "#ffd23e", "#b565d8", "#ff8fb5", "#fff"))
        drawn += flower(r.uniform(4, 252), r.uniform(184, 250), 5, petal)
    return drawn, (196, 238)


def _scene(draw: Callable[[Random], tuple[str, Ground]], phrases: str, alone: str) -> Scene:
    return Scene(draw, tuple(phrases.split("|")), tuple(alone.split("|")))


SCENES: Final = {
    "beach": _scene(
        _beach,
        "on the beach|on a beach|at the beach|on the sand",
        "a sunny beach",
    ),
    "ocean": _scene(
        _ocean,
        "in the sea|on the ocean|in the ocean|at sea",
        "the ocean|the sea",
    ),
    "underwater": _scene(
        _underwater,
        "underwater|under water|under the sea",
        "under the sea",
    ),
    "night": _scene(
        _night,
        "at night|in the night|under the stars|under the moon",
        "a starry night",
    ),
    "space": _scene(
        _space,
        "in space|in outer space|among the stars|floating in space",
        "outer space",
    ),
    "meadow": _scene(
        _meadow,
        "on the grass|in a green field|in a meadow|in a field",
        "a meadow",
    ),
    "snow": _scene(
        _snow,
        "in the snow|in winter|on a snowy day",
        "a snowy landscape",
    ),
    "desert": _scene(
        _desert,
        "in the desert|in a desert|on a sand dune",
        "a desert",
    ),
    "forest": _scene(
        _forest,
        "in the forest|in a forest|in the woods",
        "a forest|a green forest",
    ),
    "autumn": _scene(
        _autumn,
        "in an autumn forest|in autumn",
        "an autumn forest|autumn trees",
    ),
    "mountains": _scene(
        _mountains,
        "in the mountains|in front of mountains",
        "mountains",
    ),
    "city": _scene(
        _city,
        "in the city|in a city|on a city street",
        "a city|a city skyline",
    ),
    "city at night": _scene(
        _city_at_night,
        "in the city at night|in a city at night",
        "a city at night",
    ),
    "sunset": _scene(
        _sunset,
        "at sunset|in the sunset|in front of a sunset",
        "a sunset",
    ),
    "rain": _scene(
        _rain,
        "in the rain|on a rainy day",
        "a rainy day|rain and dark clouds",
    ),
    "room": _scene(
        _room,
        "in a room|inside a house|indoors|in the living room",
        "an empty room",
    ),
    "sky": _scene(
        _in_the_sky,
        "in the sky|in the clouds|flying in the sky",
        "a blue sky with clouds",
    ),
    "road": _scene(
        _road,
        "on the road|on a road|on the street",
        "a road|a country road",
    ),
    "volcano": _scene(
        _volcano,
        "near a volcano|in front of a volcano",
        "a volcano landscape",
    ),
    "rainbow": _scene(
        _under_a_rainbow,
        "under a rainbow|with a rainbow",
        "a rainbow in the sky",
    ),
    "fireworks": _scene(
        _fireworks,
        "with fireworks|under fireworks",
        "fireworks in the night sky",
    ),
    "stage": _scene(
        _on_stage,
        "on a stage|on stage",
        "an empty stage|a theater stage",
    ),
    "garden": _scene(
        _garden,
        "in a garden|in the garden|among flowers",
        "a garden with flowers",
    ),
}
