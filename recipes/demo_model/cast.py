"""Who may appear in an image: the things, sorted once by what can be said of them."""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from recipes.demo_model.captions import COLOR_WORD, is_countable
from recipes.demo_model.raster import Rasters
from recipes.demo_model.sources import PICTURES
from recipes.demo_model.things import Thing

HOUSE_STYLE: Final = next(iter(PICTURES))  #: what a caption without a style means


@dataclass(frozen=True, eq=False)
class Lot:
    """Sprites or things to draw from, some oftener than others."""

    members: Sequence[int]
    cumulated: Sequence[float]

    def draw(self, r: Random) -> int:
        at = bisect.bisect(self.cumulated, r.random() * self.cumulated[-1])
        return self.members[min(at, len(self.members) - 1)]


def lot_of(members: Sequence[int], weights: Sequence[float]) -> Lot:
    return Lot(members, list(itertools.accumulate(weights)))


@dataclass(frozen=True, eq=False)
class Cast:
    """Cast: everything that a composer chooses from, sorted once."""

    rasters: Rasters
    things: Sequence[Thing]
    styles: Sequence[dict[str, int]]  #: for each thing: style to sprite
    anything: Lot
    placeable: Lot  #: has a place in a scene or beside another thing
    countable: Lot
    recolorable: Lot  #: of things whose image in the house style takes another color
    silhouettes: Lot | None


def cast_of(rasters: Rasters) -> Cast:
    """Sort the things by what can be said of them."""
    things = rasters.things
    by_name = {thing.name: at for at, thing in enumerate(things)}
    styles: list[dict[str, int]] = [{} for _ in things]
    for sprite, facts in enumerate(rasters.facts):
        styles[by_name[facts.thing]][facts.style] = sprite

    def lot(members: list[int]) -> Lot:
        return lot_of(members, [things[at].weight for at in members])

    everyone = [at for at in range(len(things)) if colored_styles(styles[at])]
    solid = [at for at in everyone if things[at].group not in ("Symbols", "Flags")]
    placeable = [at for at in solid if len(things[at].name.split()) <= 3]
    countable = [at for at in placeable if is_countable(things[at].name)]
    recolorable = [
        at
        for at in solid
        if things[at].group not in ("Smileys & Emotion", "People & Body")
        and HOUSE_STYLE in styles[at]
        and rasters.facts[styles[at][HOUSE_STYLE]].hue is not None
        and colorless_name(things[at])
    ]
    silhouettes = [at for at in range(len(things)) if "silhouette" in styles[at]]
    return Cast(
        rasters, things, styles, lot(everyone), lot(placeable), lot(countable),
        lot(recolorable), lot(silhouettes) if silhouettes else None,
    )  # fmt: skip


def colored_styles(styles: dict[str, int]) -> list[str]:
    return [style for style in styles if style != "silhouette"]


def colorless_name(thing: Thing) -> str | None:
    """Return its first name without a color word: `a blue red apple` would be a false caption."""
    names = (thing.name, *thing.words)
    return next((name for name in names if not COLOR_WORD.search(name)), None)
