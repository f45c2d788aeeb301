"""Hostile URLs of hostile_urls.toml, and those that are too long for a file."""

import tomllib
from pathlib import Path
from typing import Any, Final

_LISTS: Final[dict[str, Any]] = tomllib.loads(
    Path(__file__).with_suffix(".toml").read_text("utf-8")
)
_TOO_LONG: Final = [
    f"http://{'a' * 64}.example/",
    f"http://{'a.' * 127}example/",
    f"http://ok.example/{'a' * 2049}",
]
#: Blocked as text, before any name is looked up.
BLOCKED_AS_TEXT: Final[list[str]] = [
    *_LISTS["addresses"],
    *_LISTS["ports"],
    *_LISTS["texts"],
    *_TOO_LONG,
]
#: Names that lead to forbidden addresses.
NAMES: Final[list[str]] = _LISTS["names"]
#: The outcome of each URL that may be called.
HARMLESS: Final[dict[str, str]] = _LISTS["harmless"]
