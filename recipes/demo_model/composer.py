"""From a seed to a caption and the image it tells the truth about."""

from random import Random
from typing import Final

from recipes.demo_model import captions
from recipes.demo_model.captions import COLOR_WORD, PALETTE, with_article
from recipes.demo_model.cast import HOUSE_STYLE, Cast, colored_styles, colorless_name
from recipes.demo_model.composition import RECOLORINGS, Backdrop, Composition, Placed, Recoloring
from recipes.demo_model.scenes import SCENES, VARIANTS

#: Sprites land on the latents' grid of 8 pixels: else one thing has 64 latents to be learned.
GRID: Final = 32

LEFT_RIGHT: Final = ((0.25, 0.5), (0.75, 0.5))
ABOVE_BELOW: Final = ((0.5, 0.25), (0.5, 0.75))
_LAYOUTS: Final = {
    2: (LEFT_RIGHT,),
    3: (
        ((0.25, 0.28125), (0.75, 0.28125), (0.5, 0.75)),
        ((0.5, 0.28125), (0.25, 0.75), (0.75, 0.75)),
        ((0.1875, 0.5), (0.5, 0.5), (0.8125, 0.5)),
    ),
    4: (((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)),),
}
NUMBER_WORDS: Final = {2: "two", 3: "three", 4: "four"}
_CORNERS: Final = {
    "in the top left corner": (0.25, 0.25),
    "in the top right corner": (0.75, 0.25),
    "in the bottom left corner": (0.25, 0.75),
    "in the bottom right corner": (0.75, 0.75),
    "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
    "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75),
}


def compose(cast: Cast, seed: str) -> Composition:
    """Compose an image; the same seed gives the same composition."""
    r = Random(seed)
    kinds = (_alone, _recolored, _in_a_scene, _pair, _several, _silhouette)
    kind = r.choices(kinds, weights=(30, 18, 24, 12, 12, 4))[0]
    return kind(cast, r)


# --- kinds of images


def _alone(cast: Cast, r: Random) -> Composition:
    """One thing before a plain background: what nearly every prompt has in it."""
    thing = cast.anything.draw(r)
    sprite, style = _sprite(cast, r, thing)
    noun, size, x, y, where = _name(cast, r, thing, sprite), _big(r), 0.5, 0.5, ""
    chance = r.random()
    if chance < 0.07:
        size = r.choice((0.3125, 0.375))
        noun = f"{r.choice(('small', 'tiny', 'little'))} {noun}"
        if r.random() < 0.5:
            where, (x, y) = r.choice(list(_CORNERS.items()))
            where = f" {where}"
    elif chance < 0.1:
        size, noun = 1.0, f"{r.choice(('big', 'large', 'huge'))} {noun}"
    core = (with_article(noun) if r.random() < 0.8 else noun) + where
    if chance > 0.95 and cast.things[thing].keywords:
        related = cast.things[thing].keywords
        core += ", " + ", ".join(r.sample(related, min(len(related), 2)))
    finish = r.choices(("none", "pixels", "gray", "sticker"), weights=(86, 5, 3, 6))[0]
    avoided = "white" if finish == "sticker" else cast.rasters.facts[sprite].color
    # A sticker's rim needs something to stand out from; without colors none may be promised.
    backdrop, words = _plain(r, avoided, named={"sticker": 1.0, "gray": 0.0}.get(finish, 0.5))
    if finish != "none":
        core = _finished(r, finish, noun)
        x = y = 0.5
    caption = captions.sentence(r, core, words, style)
    return Composition(caption, backdrop, (Placed(sprite, x, y, size),), finish)


def _finished(r: Random, finish: str, noun: str) -> str:
    a_noun = with_article(noun)
    if finish == "pixels":
        return r.choice((f"pixel art of {a_noun}", f"{a_noun}, pixel art", f"pixel art {noun}"))
    if finish == "gray":
        return r.choice((f"black and white picture of {a_noun}", f"{a_noun}, black and white"))
    return r.choice((f"a sticker of {a_noun}", f"sticker of {a_noun}", f"{noun} sticker"))


def _recolored(cast: Cast, r: Random) -> Composition:
    """One thing in a color that is not its own."""
    thing = cast.recolorable.draw(r)
    color = r.choice(list(RECOLORINGS))
    sprite, style = _sprite(cast, r, thing, unasked=0.8)
    if cast.rasters.facts[sprite].hue is None:
        sprite, style = cast.styles[thing][HOUSE_STYLE], None
    change = recoloring(cast, sprite, color)
    core = with_article(f"{captions.color_word(r, color)} {colorless_name(cast.things[thing])}")
    if r.random() < 0.25:
        backdrop, phrase = _scene(r)
        x, y = _on_ground(cast, r, backdrop.scene, sprite, 0.5625)
        placed = Placed(sprite, x, y, 0.5625, change, casts_shadow=True)
        return Composition(_styled(f"{core} {phrase}", style), backdrop, (placed,))
    backdrop, words = _plain(r, color)
    caption = captions.sentence(r, core, words, style)
    return Composition(caption, backdrop, (Placed(sprite, 0.5, 0.5, _big(r), change),))


def _in_a_scene(cast: Cast, r: Random) -> Composition:
    """No thing, one or two somewhere."""
    backdrop, phrase = _scene(r)
    chance = r.random()
    if chance < 0.04:
        place = list(SCENES.values())[backdrop.scene // VARIANTS]
        return Composition(r.choice(place.alone), backdrop, ())
    thing = cast.placeable.draw(r)
    sprite, style = _sprite(cast, r, thing, unasked=0.75)
    core = with_article(_name(cast, r, thing, sprite))
    if chance < 0.85:
        size = r.choice((0.4375, 0.5, 0.5625, 0.625))
        x, y = _on_ground(cast, r, backdrop.scene, sprite, size)
        alone = (Placed(sprite, x, y, size, casts_shadow=True),)
        finish = "pixels" if r.random() < 0.03 else "none"
        text = _styled(f"{core} {phrase}", style)
        return Composition(
            f"pixel art of {text}" if finish == "pixels" else text, backdrop, alone, finish
        )
    mate = _mate(cast, r, thing)
    beside = _sprite_in(cast, mate, cast.rasters.facts[sprite].style)
    placed = tuple(
        Placed(one, x, _on_ground(cast, r, backdrop.scene, one, 0.4375)[1], 0.4375, None, True)
        for one, x in zip((sprite, beside), (0.28125, 0.71875), strict=True)
    )
    other = with_article(_name(cast, r, mate, beside))
    return Composition(_styled(f"{core} and {other} {phrase}", style), backdrop, placed)


def _pair(cast: Cast, r: Random) -> Composition:
    """Two things and where they are."""
    thing = cast.placeable.draw(r)
    mate = _mate(cast, r, thing)
    sprite, style = _sprite(cast, r, thing, unasked=0.8)
    beside = _sprite_in(cast, mate, cast.rasters.facts[sprite].style)
    a, b = (with_article(_name(cast, r, *one)) for one in ((thing, sprite), (mate, beside)))
    core, spots = _related(r, a, b)
    size = r.choice((0.4375, 0.46875))
    placed = tuple(
        Placed(one, x, y, size) for one, (x, y) in zip((sprite, beside), spots, strict=True)
    )
    backdrop, words = _plain(r, None, named=0.4)
    return Composition(captions.sentence(r, core, words, style), backdrop, placed)


def _related(r: Random, a: str, b: str) -> tuple[str, tuple[tuple[float, float], ...]]:
    """(words, where a and b are)."""
    says = {
        "and": (f"{a} and {b}", f"{a} next to {b}", f"{a} with {b}", f"{a} beside {b}"),
        "left": (f"{a} on the left and {b} on the right", f"{a} to the left of {b}",
                 f"{a} left of {b}"),
        "right": (f"{a} on the right and {b} on the left", f"{a} to the right of {b}",
                  f"{a} right of {b}"),
        "above": (f"{a} above {b}", f"{a} on top of {b}", f"{a} over {b}"),
        "below": (f"{a} below {b}", f"{a} under {b}"),
    }  # fmt: skip
    relation = r.choices(list(says), weights=(28, 19, 19, 17, 17))[0]
    spots = ABOVE_BELOW if relation in ("above", "below") else LEFT_RIGHT
    if relation in ("right", "below"):
        spots = (spots[1], spots[0])
    return r.choice(says[relation]), spots


def _several(cast: Cast, r: Random) -> Composition:
    """Two, three or four of a kind."""
    thing = cast.countable.draw(r)
    sprite, style = _sprite(cast, r, thing, unasked=0.85)
    count = r.choice((2, 3, 4))
    noun = r.choice([name for name in _names(cast, thing) if captions.is_countable(name)])
    facts, color, change = cast.rasters.facts[sprite], None, None
    if facts.hue is not None and not COLOR_WORD.search(noun) and r.random() < 0.25:
        color = r.choice(list(RECOLORINGS))
        change = recoloring(cast, sprite, color)
    spots = r.choice(_LAYOUTS[count])
    in_a_row = count == 3 and len({y for _, y in spots}) == 1
    size = 0.28125 if in_a_row else r.choice((0.40625, 0.4375))
    placed = tuple(Placed(sprite, x, y, size, change) for x, y in spots)
    number = NUMBER_WORDS[count] if r.random() < 0.85 else str(count)
    told = f"{captions.color_word(r, color)} " if color else ""
    backdrop, words = _plain(r, color or facts.color, named=0.4)
    core = f"{number} {told}{captions.plural(noun)}"
    return Composition(captions.sentence(r, core, words, style), backdrop, placed)


def _silhouette(cast: Cast, r: Random) -> Composition:
    if cast.silhouettes is None:
        return _alone(cast, r)
    thing = cast.silhouettes.draw(r)
    color = "black" if r.random() < 0.4 else r.choice(list(PALETTE))
    noun = r.choice(_names(cast, thing))
    told = "" if color == "black" and r.random() < 0.5 else f"{captions.color_word(r, color)} "
    core = with_article(f"{told}{noun} silhouette")
    if r.random() < 0.3:
        core = f"{with_article(f'{told}silhouette')} of {with_article(noun)}"
    backdrop, words = _plain(r, color)
    paint = Recoloring(True, (*_rgb(r, color), 0.0))
    placed = Placed(cast.styles[thing]["silhouette"], 0.5, 0.5, _big(r), paint)
    return Composition(captions.sentence(r, core, words, None), backdrop, (placed,))


# --- choices


def _names(cast: Cast, thing: int) -> list[str]:
    return [cast.things[thing].name, *cast.things[thing].words]


def _name(cast: Cast, r: Random, thing: int, sprite: int) -> str:
    """One of its names; now and then with the color it has anyway."""
    name = r.choice(_names(cast, thing))
    color = cast.rasters.facts[sprite].color
    if color and not COLOR_WORD.search(name) and r.random() < 0.15:
        return f"{captions.color_word(r, color)} {name}"
    return name


def _sprite(cast: Cast, r: Random, thing: int, *, unasked: float = 0.6) -> tuple[int, str | None]:
    """(sprite, words for its style or None). No words always means the house style."""
    styles = cast.styles[thing]
    usual = _usual_style(styles)
    if r.random() < unasked:
        return styles[usual], None
    style = r.choice(colored_styles(styles))
    return styles[style], captions.style_phrase(r, style)


def _usual_style(styles: dict[str, int]) -> str:
    return HOUSE_STYLE if HOUSE_STYLE in styles else colored_styles(styles)[0]


def _sprite_in(cast: Cast, thing: int, style: str) -> int:
    """In that style if there is one."""
    styles = cast.styles[thing]
    return styles[style] if style in styles else styles[_usual_style(styles)]


def _mate(cast: Cast, r: Random, thing: int) -> int:
    """Another thing; the same one if there is only one."""
    others = (cast.placeable.draw(r) for _ in range(8))
    return next((other for other in others if other != thing), thing)


def _big(r: Random) -> float:
    return r.choice((0.8125, 0.84375, 0.875))


def recoloring(cast: Cast, sprite: int, color: str) -> Recoloring:
    hue, saturation, value, lift = RECOLORINGS[color]
    facts = cast.rasters.facts[sprite]
    turn = 0.0 if hue is None else (hue - (facts.hue or 0.0)) / 360
    near = facts.hue if facts.has_other_hues else None
    return Recoloring(False, (turn, saturation, value, lift), near)


def _rgb(r: Random, color: str) -> tuple[float, float, float]:
    """Return that color or one near it; white stays nearly white."""
    low, high = (-4, 0) if color == "white" else (-10, 10)
    red, green, blue = (
        max(0.0, min(1.0, (channel + r.uniform(low, high)) / 255)) for channel in PALETTE[color]
    )
    return red, green, blue


def _plain(r: Random, avoided: str | None, *, named: float = 0.5) -> tuple[Backdrop, str | None]:
    """(background, words for it or None). Unnamed ones are white, so that a prompt can rely on it.

    A thing on its own color cannot be seen: `avoided` is not taken, and white is grayed for it.
    """
    if r.random() >= named:
        white = (0.8, 0.8, 0.8) if avoided == "white" else _rgb(r, "white")
        return Backdrop(first=white), None
    first, second = r.sample([color for color in PALETTE if color != avoided], 2)
    a, b = captions.color_word(r, first), captions.color_word(r, second)
    kind = r.choices(("plain", "gradient", "dots", "stripes"), weights=(80, 10, 5, 5))[0]
    words = {
        "plain": f"{a} background",
        "gradient": f"{a} {r.choice(('to', 'and'))} {b} gradient background",
        "dots": f"{a} background with {b} dots",
        "stripes": f"{a} background with {b} stripes",
    }[kind]  # fmt: skip
    return Backdrop(kind, _rgb(r, first), _rgb(r, second)), words


def _scene(r: Random) -> tuple[Backdrop, str]:
    index = r.randrange(len(SCENES) * VARIANTS)
    place = list(SCENES.values())[index // VARIANTS]
    return Backdrop("scene", scene=index), r.choice(place.phrases)


def _on_ground(cast: Cast, r: Random, scene: int, sprite: int, size: float) -> tuple[float, float]:
    """Return a center: feet on the scene's ground, or near the middle for floating things."""
    ground = cast.rasters.grounds[scene]
    x = r.uniform(0.36, 0.64)
    if ground is None:
        return _on_grid(x), _on_grid(r.uniform(0.36, 0.62))
    feet = r.uniform(*ground) / 256
    return _on_grid(x), _on_grid(feet - cast.rasters.facts[sprite].height * size / 2)


def _on_grid(share: float) -> float:
    return round(share * GRID) / GRID


def _styled(core: str, style: str | None) -> str:
    return f"{core}, {style}" if style else core
