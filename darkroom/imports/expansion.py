"""Parameter sweeps: `a {red|green} apple` and `4|8|16` in one cell expand to many jobs.

Only on request (`expand`): braces are common in prompts and have no meaning by default.
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
    """Yield every combination in order: the last choice of the row changes fastest.

    `{a|b}` in a prompt is a choice, and so is a list; braces without `|` are only braces.
    Raise InvalidInput if the lists of a `zip` differ in length or the product is too large.
    """
    texts = {name: _parts(values.get(name)) for name in _TEMPLATES}
    lists = {name: value for name, value in values.items() if isinstance(value, list)}
    choices = [choice for parts in texts.values() for choice in parts[1::2]] + list(lists.values())
    _check_sizes(choices, how)
    for chosen in _combinations(choices, how):
        remaining = iter(chosen)
        filled = {
            name: _filled(parts, remaining) for name, parts in texts.items() if len(parts) > 1
        }
        yield {**values, **filled, **dict(zip(lists, remaining, strict=True))}


def _parts(template: object) -> list[Sequence[str]]:
    """Split a template into plain text (even indices) and choices (odd indices)."""
    pieces = _CHOICE.split(template) if isinstance(template, str) else [""]
    return [piece.split("|") if index % 2 else [piece] for index, piece in enumerate(pieces)]


def _filled(parts: Sequence[Sequence[str]], chosen: Iterator[object]) -> str:
    return "".join(str(next(chosen)) if index % 2 else part[0] for index, part in enumerate(parts))


def _combinations(choices: Sequence[Sequence[object]], how: Expand) -> Iterator[tuple[object, ...]]:
    if how is Expand.PRODUCT or not choices:
        return product(*choices)
    return zip(*choices, strict=True)


def _check_sizes(choices: Sequence[Sequence[object]], how: Expand) -> None:
    sizes = [len(choice) for choice in choices]
    if how is Expand.ZIP and len(set(sizes)) > 1:
        lengths = ", ".join(map(str, sizes))
        message = f"the lists of a zip must have equal lengths; these have {lengths}"
        raise bad_cell("prompt", "unequal_list_lengths", message)
    if how is Expand.PRODUCT and math.prod(sizes) > MAX_VARIANTS:
        message = f"makes {math.prod(sizes):,} jobs of one row; at most {MAX_VARIANTS:,}"
        raise bad_cell("prompt", "too_many_variants", message)
