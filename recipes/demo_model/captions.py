"""Captions: English for what an image shows, with articles, plurals, colors and styles."""

import re
from random import Random
from typing import Final

RGB = tuple[int, int, int]

PALETTE: Final[dict[str, RGB]] = {
    "red": (220, 38, 38),
    "orange": (247, 140, 30),
    "yellow": (250, 212, 50),
    "green": (52, 168, 70),
    "teal": (20, 165, 160),
    "blue": (45, 105, 228),
    "purple": (140, 66, 200),
    "pink": (246, 130, 182),
    "brown": (132, 82, 46),
    "black": (14, 14, 16),
    "white": (255, 255, 255),
    "gray": (140, 142, 146),
    "light blue": (156, 208, 250),
    "dark blue": (22, 38, 110),
    "light green": (168, 230, 150),
    "dark green": (14, 84, 44),
    "beige": (242, 228, 200),
    "gold": (222, 172, 38),
    "lavender": (206, 188, 246),
}
_SYNONYMS: Final = {
    "gray": ("gray", "grey"),
    "teal": ("teal", "turquoise", "cyan"),
    "purple": ("purple", "violet"),
    "light blue": ("light blue", "sky blue", "pale blue"),
    "dark blue": ("dark blue", "navy", "navy blue"),
    "gold": ("gold", "golden"),
    "beige": ("beige", "cream"),
    "light green": ("light green", "mint green"),
}
COLOR_WORD: Final = re.compile(
    r"\b(red|orange|yellow|green|teal|blue|purple|pink|brown|black|white|gr[ae]y|gold|golden|"
    r"silver|colorful|rainbow|cyan)\b"
)
STYLE_PHRASES: Final = {
    "flat": ("flat style", "flat style", "flat design"),
    "3d": ("3d style", "3d style", "3d render", "3d"),
    "noto": ("noto style", "noto style", "noto emoji"),
    "twemoji": ("twemoji style", "twemoji"),
    "outline": ("outline style", "outline style", "line art style", "outlined cartoon style"),
}
_OPENINGS: Final = (
    "a picture of ",
    "an icon of ",
    "an illustration of ",
    "a drawing of ",
    "an emoji of ",
    "an image of ",
)
_PLURALS: Final = {
    "mouse": "mice",
    "person": "people",
    "child": "children",
    "wolf": "wolves",
    "leaf": "leaves",
    "knife": "knives",
    "fish": "fish",
    "sheep": "sheep",
    "goose": "geese",
    "tooth": "teeth",
    "foot": "feet",
    "deer": "deer",
    "bison": "bison",
    "ox": "oxen",
}
_UNCOUNTED: Final = frozenset(
    [
        "jeans",
        "scissors",
        "glasses",
        "sunglasses",
        "pants",
        "trousers",
        "books",
        "flowers",
        "swords",
        "tools",
        "grapes",
        "cherries",
        "bread",
        "bacon",
        "rice",
        "water",
        "milk",
        "butter",
        "salt",
        "honey",
    ]
)


def with_article(noun: str) -> str:
    """With "cat": "a cat"; with "flag of japan": "the flag of japan"."""
    first, last = noun.split(maxsplit=1)[0], noun.rsplit(maxsplit=1)[-1]
    if noun.startswith("flag of "):
        return f"the {noun}"
    if last in _UNCOUNTED or (last.endswith("s") and not last.endswith(("ss", "us", "is"))):
        return noun
    sounds_open = first[0] in "aeio" or first.startswith(("umb", "urn", "hour", "x-"))
    return f"an {noun}" if sounds_open and not first.startswith("one") else f"a {noun}"


def plural(noun: str) -> str:
    """Return the plural of the last word: "fire engine" becomes "fire engines"."""
    *before, last = noun.split()
    if last in _PLURALS:
        last = _PLURALS[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        last = f"{last[:-1]}ies"
    else:
        last += "s"
    return " ".join([*before, last])


def is_countable(noun: str) -> bool:
    words = noun.split()
    plain = len(words) <= 2 and not re.search(r"\b(of|with|in|on)\b", noun)
    return plain and words[-1] not in _UNCOUNTED and not noun.endswith("s")


def color_word(r: Random, color: str) -> str:
    """One of the words for it."""
    return r.choice(_SYNONYMS.get(color, (color,)))


def style_phrase(r: Random, style: str) -> str:
    return r.choice(STYLE_PHRASES[style])


def sentence(r: Random, core: str, background: str | None, style: str | None) -> str:
    """Write one caption: the things, the background, the style."""
    if style and r.random() < 0.15:
        kind = style.removesuffix(" style")
        noun = re.sub(r"^(a|an|the) ", "", core)
        core, style = with_article(f"{kind} {noun}"), None
    elif r.random() < 0.15:
        core = r.choice(_OPENINGS) + core
    if background:
        joint = r.choice((" on ", " on ", " on ", " with ", " against ", ", "))
        core += joint + (background if joint == ", " else with_article(background))
    if style:
        core += r.choice((", ", ", ", " in ")) + style
    return core
