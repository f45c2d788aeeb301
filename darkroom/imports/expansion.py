"""One row that stands for many: `a {red|green} apple`, and several values in one cell.

Only where a sweep was asked for: braces are common in prompts and mean nothing by themselves.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Final

from darkroom.imports.columns import bad_cell
from darkroom.status import Expand

MAX_VARIANTS: Final = 10_000  #: of one row
_CHOICE: Final = re.compile(r"\{([^{}]*\|[^{}]*)\}")
_TEMPLATES: Final = ("prompt", "negative_prompt")


def variants(values: Mapping[str, object], how: Expand) -> Iterator[dict[str, object]]:
    """Every combination, in order: the last choice of the row changes fastest.

    `{a|b}` in a prompt is a choice, and so is a list; braces without `|` are only braces.
    Raises InvalidInput when the lists of a `zip` differ in length, or there are too many.
    """
    texts = {name: _parts(values.get(name)) for name in _TEMPLATES}
    lists = {name: value for name, value in values.items() if isinstance(value, list)}
    choices = [choice for parts in texts.values() for choice in parts[1::2]] + list(lists.values())
    _check(choices, how)
    for chosen in _combinations(choices, how):
        left = iter(chosen)
        filled = {name: _filled(parts, left) for name, parts in texts.items() if len(parts) > 1}
        yield {**values, **filled, **dict(zip(lists, left, strict=True))}


def _parts(template: object) -> list[Sequence[str]]:
    """Plain text and choices in turns, plain text first and last."""
    pieces = _CHOICE.split(template) if isinstance(template, str) else [""]
    return [piece.split("|") if place % 2 else [piece] for place, piece in enumerate(pieces)]


def _filled(parts: Sequence[Sequence[str]], chosen: Iterator[object]) -> str:
    return "".join(str(next(chosen)) if place % 2 else part[0] for place, part in enumerate(parts))


def _combinations(choices: Sequence[Sequence[object]], how: Expand) -> Iterator[tuple[object, ...]]:
    if how is Expand.PRODUCT or not choices:
        return product(*choices)
    return zip(*choices, strict=True)


def _check(choices: Sequence[Sequence[object]], how: Expand) -> None:
    sizes = [len(choice) for choice in choices]
    if how is Expand.ZIP and len(set(sizes)) > 1:
        listed = ", ".join(map(str, sizes))
        message = f"the choices of a zip must be equally many; here are {listed}"
        raise bad_cell("prompt", "unequal_list_lengths", message)
    if how is Expand.PRODUCT and math.prod(sizes) > MAX_VARIANTS:
        message = f"makes {math.prod(sizes):,} jobs of one row; at most {MAX_VARIANTS:,}"
        raise bad_cell("prompt", "too_many_variants", message)
