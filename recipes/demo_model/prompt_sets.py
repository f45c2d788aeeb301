"""Fixed prompts of the evaluation, and for each an image that is right by construction."""

import itertools
from dataclasses import dataclass
from typing import Final

from recipes.demo_model.captions import PALETTE, plural, with_article
from recipes.demo_model.cast import HOUSE_STYLE, Cast, colorless_name
from recipes.demo_model.composer import ABOVE_BELOW, LEFT_RIGHT, NUMBER_WORDS, recoloring
from recipes.demo_model.composition import RECOLORINGS, Backdrop, Composition, Placed
from recipes.demo_model.scenes import SCENES, VARIANTS

SCORES: Final = ("color", "background", "place", "count", "position", "thing")
HELD_OUT: Final = "held_out_color"
BASIC_COLORS: Final = tuple(RECOLORINGS)
_RECOLORED: Final = ("car", "fish", "dog", "guitar", "rose", "dress", "balloon",
                     "octopus", "apple")  # fmt: skip
_HELD_OUT_THINGS: Final = 99
_ON_BACKGROUNDS: Final = ("cat", "key", "pizza", "rocket", "frog", "crown", "bicycle", "owl")
_IN_PLACES: Final = ("dog", "robot", "bicycle", "penguin", "rabbit", "ghost")
_COUNTED: Final = ("cat", "dog", "banana", "strawberry", "star", "fish", "mushroom", "rocket",
                   "frog", "cookie", "butterfly", "apple", "car", "balloon", "rose", "snail",
                   "carrot", "crab", "turtle", "key", "lemon", "pizza", "snowman", "crown",
                   "guitar")  # fmt: skip
#: Things of one color each: color tells which is where.
_COLORED: Final = {"strawberry": "red", "banana": "yellow", "frog": "green",
                   "blue heart": "blue", "eggplant": "purple", "tangerine": "orange"}  # fmt: skip
_DRAWN: Final = (
    "cat", "dog", "elephant", "penguin", "owl", "fish", "whale", "octopus", "butterfly", "snail",
    "turtle", "frog", "lion", "tiger", "panda", "koala", "fox", "wolf", "horse", "cow", "pig",
    "rabbit", "monkey", "bear", "unicorn", "dragon", "parrot", "duck", "flamingo", "snake",
    "banana", "strawberry", "watermelon", "pineapple", "grapes", "cherries", "lemon", "carrot",
    "broccoli", "mushroom", "pizza", "hamburger", "french fries", "hot dog", "taco", "doughnut",
    "cookie", "birthday cake", "soft ice cream", "cheese wedge", "bicycle", "automobile",
    "rocket", "sailboat", "airplane", "helicopter", "locomotive", "bus", "tractor", "fire engine",
    "cactus", "sunflower", "rose", "tulip", "palm tree", "evergreen tree", "maple leaf",
    "four leaf clover", "house", "castle", "tent", "umbrella", "crown", "key", "guitar",
    "trumpet", "drum", "violin", "balloon", "wrapped gift", "candle", "light bulb", "camera",
    "laptop", "alarm clock", "backpack", "top hat", "scissors", "hammer", "notifier", "anchor",
    "robot", "ghost", "snowman", "teddy bear", "skull", "alien", "soccer ball", "trophy",
    "red heart",
)  # fmt: skip
_PLACES_ASKED: Final = tuple(place for place in SCENES if place != "city at night")  # fmt: skip
_RELATIONS: Final = {
    "left": "{a} to the left of {b}",
    "right": "{a} to the right of {b}",
    "above": "{a} above {b}",
    "below": "{a} below {b}",
}


@dataclass(frozen=True)
class Asked:
    """One prompt and what an image must show to count as right."""

    score: str  #: one of SCORES, or HELD_OUT
    prompt: str
    expected: str  #: the color, the place, the number, the relation or the thing
    things: tuple[str, ...]
    colors: tuple[str, ...] = ()  #: of the things, where the score looks at them


def asked() -> list[Asked]:
    """Return all prompts, always in this order: a prompt's number is its seed."""
    return [*_colors(), *_backgrounds(), *_places(), *_counts(), *_positions(), *_things()]


def _colors() -> list[Asked]:
    return [
        Asked("color", with_article(f"{color} {thing}"), color, (thing,), (color,))
        for thing, color in itertools.product(_RECOLORED, BASIC_COLORS)
        if color != "white"  # on white it can be right and yet not be seen
    ]


def held_out_colors(cast: Cast) -> list[Asked]:
    """Other things in other colors: to see whether `color` tells of more than its own prompts.

    No list by hand, and a rule that was fixed before any image of them: of the things that can be
    recolored, but for those of the color score, so many evenly spread over the data set's order;
    each is asked for once, in the next of the colors.
    """
    colors = [color for color in BASIC_COLORS if color != "white"]
    asked_before = {one.things[0] for one in _colors()}
    things = [cast.things[at] for at in sorted(cast.recolorable.members)]
    names = [
        colorless_name(thing)
        for thing in things
        if asked_before.isdisjoint((thing.name, *thing.words))
    ]
    count = min(_HELD_OUT_THINGS, len(names))
    spread = [names[at * len(names) // count] for at in range(count)]
    return [
        Asked(HELD_OUT, with_article(f"{color} {name}"), color, (name,), (color,))
        for name, color in zip(spread, itertools.cycle(colors), strict=False)
        if name is not None
    ]


def _backgrounds() -> list[Asked]:
    return [
        Asked("background", f"{with_article(thing)} on {with_article(color)} background", color,
              (thing,))
        for thing, color in itertools.product(_ON_BACKGROUNDS, BASIC_COLORS)
    ]  # fmt: skip


def _places() -> list[Asked]:
    return [
        Asked("place", f"{with_article(thing)} {SCENES[place].phrases[0]}", place, (thing,))
        for thing, place in itertools.product(_IN_PLACES, _PLACES_ASKED)
    ]


def _counts() -> list[Asked]:
    return [
        Asked("count", f"{NUMBER_WORDS[count]} {plural(thing)}", str(count), (thing,))
        for thing, count in itertools.product(_COUNTED, NUMBER_WORDS)
    ]


def _positions() -> list[Asked]:
    return [
        Asked(
            "position",
            _RELATIONS[relation].format(a=with_article(a), b=with_article(b)),
            relation,
            (a, b),
            (_COLORED[a], _COLORED[b]),
        )
        for (a, b), relation in itertools.product(itertools.permutations(_COLORED, 2), _RELATIONS)
    ]


def _things() -> list[Asked]:
    return [Asked("thing", with_article(thing), thing, (thing,)) for thing in _DRAWN]


def composed(cast: Cast, one: Asked, number: int) -> Composition:
    """Compose what the prompt asks for: right by construction, so every measure must pass it."""
    sprites = [_sprite(cast, thing) for thing in one.things]
    backdrop = Backdrop()
    placed = [Placed(sprites[0], 0.5, 0.5, 0.84375)]
    if one.score in ("color", HELD_OUT):
        placed = [Placed(sprites[0], 0.5, 0.5, 0.84375, recoloring(cast, sprites[0], one.expected))]
    if one.score == "background":
        red, green, blue = (channel / 255 for channel in PALETTE[one.expected])
        backdrop = Backdrop(first=(red, green, blue))
    if one.score == "place":
        variant = list(SCENES).index(one.expected) * VARIANTS + number % VARIANTS
        backdrop = Backdrop("scene", scene=variant)
        placed = [Placed(sprites[0], 0.5, 0.625, 0.5, casts_shadow=True)]
    if one.score == "count":
        spots = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))[: int(one.expected)]
        placed = [Placed(sprites[0], x, y, 0.4375) for x, y in spots]
    if one.score == "position":
        spots = LEFT_RIGHT if one.expected in ("left", "right") else ABOVE_BELOW
        ordered = spots if one.expected in ("left", "above") else spots[::-1]
        placed = [Placed(s, x, y, 0.4375) for s, (x, y) in zip(sprites, ordered, strict=True)]
    return Composition(one.prompt, backdrop, tuple(placed))


def _sprite(cast: Cast, name: str) -> int:
    """In the house style, by any of the thing's names."""
    for at, thing in enumerate(cast.things):
        if name == thing.name or name in thing.words:
            return cast.styles[at].get(HOUSE_STYLE, next(iter(cast.styles[at].values())))
    raise KeyError(name)
