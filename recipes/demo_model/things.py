"""Which things the model learns, what they are called, and the image of each in every style."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from recipes.demo_model.everyday_words import EVERYDAY_WORDS
from recipes.demo_model.sources import PICTURES, read_assets, read_json

#: How often things of a Unicode group are drawn, before everyday names count double.
GROUP_WEIGHTS: Final = {
    "Animals & Nature": 2.4,
    "Food & Drink": 2.2,
    "Travel & Places": 1.6,
    "Activities": 1.2,
    "Objects": 1.2,
    "Smileys & Emotion": 0.9,
    "People & Body": 0.35,
    "Symbols": 0.4,
    "Flags": 0.3,
}
#: Two hundred flags cannot be learned from thumbnails; these are the ones a visitor tries.
FLAGS: Final = frozenset(
    [
        "argentina",
        "australia",
        "austria",
        "belgium",
        "brazil",
        "canada",
        "china",
        "colombia",
        "denmark",
        "egypt",
        "finland",
        "france",
        "germany",
        "greece",
        "india",
        "indonesia",
        "ireland",
        "israel",
        "italy",
        "japan",
        "mexico",
        "netherlands",
        "norway",
        "poland",
        "portugal",
        "romania",
        "russia",
        "spain",
        "sweden",
        "switzerland",
        "thailand",
        "turkey",
        "ukraine",
        "vietnam",
    ]
) | {"south korea", "united kingdom", "united states", "south africa", "new zealand"}

_LEFT_OUT: Final = re.compile(
    r"^(keycap|family|couple|kiss|people|men|women|man|woman|deaf|person)\b|skin tone|button|"
    r"oclock|thirty|holding hands|with bunny ears|: (red|white|curly|bald)|\bhair\b|cigarette|"
    r"smoking|middle finger|bikini|underwear|\bbra\b|noose|swastika|pistol|\bmedium\b|\bsmall\b|"
    r"dotted|hollow|pregnant|breast-feeding"
)
_SHAPES: Final = re.compile(r"\b(circle|square|diamond|triangle|heart|note|notes|star)\b")


@dataclass(frozen=True)
class Thing:
    """One thing with a name. `code_points` is its emoji as hexadecimal, joined by hyphens."""

    name: str
    group: str
    code_points: str
    words: tuple[str, ...]  #: everyday words for it and nothing else
    keywords: tuple[str, ...]  #: what it has to do with; shared with others

    @property
    def weight(self) -> float:
        is_everyday = self.words or " " not in self.name
        return GROUP_WEIGHTS[self.group] * (2.0 if is_everyday else 1.0)


@dataclass(frozen=True)
class Sprite:
    """Image of one thing in one style, as in its package: SVG text or WebP bytes."""

    thing: str
    style: str
    kind: str  #: "svg" or "webp"
    content: bytes = field(repr=False)


def read_things(names: Path, keywords: Path) -> list[Thing]:
    """List all things to learn, in Unicode's order."""
    emoji: Mapping[str, Any] = read_json(names, "data-by-emoji.json")
    related: Mapping[str, list[str]] = read_json(keywords, "dist/emoji-en-US.json")
    chosen = {}
    for text, entry in emoji.items():
        name = _plain(entry["name"])
        if _is_learned(name, entry["group"]):
            chosen[name] = (text, entry["group"])
    return [
        Thing(
            name=name,
            group=group,
            code_points=_code_points(text),
            words=_words(name, taken=chosen.keys()),
            keywords=_keywords(related.get(text, [])),
        )
        for name, (text, group) in chosen.items()
    ]


def _plain(name: str) -> str:
    name = re.sub(
        r"^flag:? ", "flag of ", re.sub("[“”.\N{RIGHT SINGLE QUOTATION MARK}]", "", name.lower())
    )
    return re.sub(r"\s+", " ", name).strip()


def _is_learned(name: str, group: str) -> bool:
    if name.startswith("flag of "):
        return name.removeprefix("flag of ") in FLAGS
    if group == "Flags" or _LEFT_OUT.search(name):
        return False
    return group != "Symbols" or _SHAPES.search(name) is not None


def _code_points(text: str) -> str:
    """Without the variation selector, about which the packages disagree."""
    return "-".join(f"{ord(character):04x}" for character in text if character != "\ufe0f")


def _words(name: str, *, taken: Any) -> tuple[str, ...]:
    """Name a face after its animal, unless the animal has an image of its own."""
    words = [word for word in EVERYDAY_WORDS.get(name, ()) if word not in taken]
    animal = name.removesuffix(" face")
    if animal != name and " " not in animal and animal in _ANIMALS and animal not in taken:
        words.insert(0, animal)
    if name.startswith("flag of "):
        words.append(name.removeprefix("flag of ") + " flag")
    return tuple(words)


_ANIMALS: Final = frozenset(
    ["cat", "cow", "dog", "dragon", "horse", "monkey", "moose", "mouse", "pig", "rabbit", "tiger"]
)


def _keywords(related: list[str]) -> tuple[str, ...]:
    """Return the plain and short keywords; the first entry only repeats the name."""
    plain = (word.lower().replace("_", " ") for word in related[1:])
    fit = [word for word in plain if re.fullmatch(r"[a-z]{3,12}( [a-z]{3,12})?", word)]
    return tuple(dict.fromkeys(fit))[:5]


def read_sprites(things: list[Thing], packages: Mapping[str, Path]) -> Iterator[Sprite]:
    """Every image of these things in `packages`, which are archives by style."""
    for style in PICTURES:
        archive = packages[style]
        if style == "3d":
            yield from _bitmaps(things, archive, style)
        elif style == "silhouette":
            yield from _silhouettes(things, read_json(archive, "icons.json"), style)
        else:
            yield from _vectors(things, archive, style)


def _bitmaps(things: list[Thing], archive: Path, style: str) -> Iterator[Sprite]:
    pictures = {
        stem.replace("-fe0f", ""): content for stem, content in read_assets(archive, ".webp")
    }
    for thing in things:
        if thing.code_points in pictures and thing.group != "Flags":
            yield Sprite(thing.name, style, "webp", pictures[thing.code_points])


def _vectors(things: list[Thing], archive: Path, style: str) -> Iterator[Sprite]:
    """By code point where the package knows them, else by name."""
    icons = read_json(archive, "icons.json")
    by_code_points = {}
    if style != "outline":
        named = read_json(archive, "chars.json").items()
        by_code_points = {points.replace("-fe0f", ""): name for points, name in named}
    for thing in things:
        slug = re.sub(r"[^a-z0-9]+", "-", thing.name)
        candidates = (by_code_points.get(thing.code_points), slug, f"{slug}-1")
        icon = next((name for name in candidates if name in icons["icons"]), None)
        if icon is not None:
            yield Sprite(thing.name, style, "svg", _svg(icons, icon))


def _silhouettes(things: list[Thing], icons: Any, style: str) -> Iterator[Sprite]:
    """Only those that bear a thing's name, or are its head: the rest has odd names."""
    for thing in things:
        slugs = [name.replace(" ", "-") for name in (thing.name, *thing.words)]
        candidates = [*slugs, *(f"{slug}-head" for slug in slugs)]
        icon = next((name for name in candidates if name in icons["icons"]), None)
        if icon is not None:
            yield Sprite(thing.name, style, "svg", _svg(icons, icon))


def _svg(icons: Any, name: str) -> bytes:
    """Return an icon of an Iconify set as a file of its own."""
    icon = icons["icons"][name]
    left, top = (icon.get(side, icons.get(side, 0)) for side in ("left", "top"))
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}" color="#000">'
        f"{icon['body']}</svg>"
    ).encode()


def counts_by_style(sprites: list[Sprite]) -> Counter[str]:
    return Counter(sprite.style for sprite in sprites)
