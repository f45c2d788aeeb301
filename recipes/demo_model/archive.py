"""Data set as one file: names and images, the same bytes on every machine."""

import hashlib
import json
import lzma
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from recipes.demo_model.sources import PICTURES, WORDS, fetch
from recipes.demo_model.things import Sprite, Thing, counts_by_style, read_sprites, read_things

_EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # the earliest date a zip can bear; today's would change it
#: What `digest` says of the data set that the shipped weights learned from.
EXPECTED_DIGEST: Final = "114e7f38d09f198b61148684efcf43781e6a8f2efed28c29b60a7a265df3b98c"


@dataclass(frozen=True)
class DataSet:
    """Things and their images."""

    things: list[Thing]
    sprites: list[Sprite]


def build(packages: Path) -> DataSet:
    """From the packages in that folder, fetched if need be. Raises WrongPackage."""
    names, keywords = (fetch(package, packages) for package in WORDS)
    archives = {style: fetch(package, packages) for style, package in PICTURES.items()}
    things = read_things(names, keywords)
    sprites = list(read_sprites(things, archives))
    drawn = {sprite.thing for sprite in sprites}
    return DataSet([thing for thing in things if thing.name in drawn], sprites)


def digest(data_set: DataSet) -> str:
    """SHA-256 over all names and images: what must not change from one build to the next."""
    whole = hashlib.sha256()
    for part in _parts(data_set):
        whole.update(part)
    return whole.hexdigest()


def write(data_set: DataSet, path: Path) -> None:
    """One zip: names as JSON, vectors in a single xz stream, bitmaps as they are."""
    described, vectors, bitmaps = _parts(data_set)
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (
            ("names.json", described),
            ("vectors.xz", lzma.compress(vectors, preset=9)),
            ("bitmaps", bitmaps),
        ):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), content)


def read(path: Path) -> DataSet:
    """Read what `write` wrote."""
    with zipfile.ZipFile(path) as archive:
        described = json.loads(archive.read("names.json"))
        streams = {
            "svg": lzma.decompress(archive.read("vectors.xz")),
            "webp": archive.read("bitmaps"),
        }
    things = [Thing(**_as_tuples(thing)) for thing in described["things"]]
    return DataSet(things, list(_cut(described["sprites"], streams)))


def _parts(data_set: DataSet) -> tuple[bytes, bytes, bytes]:
    described = {
        "things": [asdict(thing) for thing in data_set.things],
        "sprites": [(s.thing, s.style, s.kind, len(s.content)) for s in data_set.sprites],
    }
    streams = {"svg": bytearray(), "webp": bytearray()}
    for sprite in data_set.sprites:
        streams[sprite.kind] += sprite.content
    text = json.dumps(described, separators=(",", ":"), sort_keys=True)
    return text.encode(), bytes(streams["svg"]), bytes(streams["webp"])


def _cut(rows: list[tuple[str, str, str, int]], streams: dict[str, bytes]) -> Iterator[Sprite]:
    positions = dict.fromkeys(streams, 0)
    for thing, style, kind, length in rows:
        start = positions[kind]
        positions[kind] = start + length
        yield Sprite(thing, style, kind, streams[kind][start : start + length])


def _as_tuples(thing: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in thing.items()}


def summary(data_set: DataSet) -> str:
    """Summarize an archive for the terminal."""
    counts = counts_by_style(data_set.sprites)
    lines = [f"  {style:<11}{counts[style]:>6} pictures, {p.license}, {p.name} {p.version}"
             for style, p in PICTURES.items()]  # fmt: skip
    total = f"{len(data_set.things)} things, {len(data_set.sprites)} pictures"
    return "\n".join([total, *lines])
