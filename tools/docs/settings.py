"""Reference page of the settings, from the fields of `Settings`."""

from pathlib import Path
from typing import Any, Final, get_args

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from darkroom.settings import HOME, Settings

_HEAD: Final = "| variable | type | default | effect |\n|---|---|---|---|\n"


def table() -> str:
    """Return a row for each setting, in the order of the code."""
    return _HEAD + "".join(_row(*each) for each in Settings.model_fields.items())


def _row(name: str, field: FieldInfo) -> str:
    cells = (f"`DARKROOM_{name.upper()}`", _type(field), _default(field.default), field.description)
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |\n"


def _type(field: FieldInfo) -> str:
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    if kinds and all(isinstance(kind, str) for kind in kinds):
        return " or ".join(f"`{kind}`" for kind in kinds)
    kind = kinds[0] if kinds else field.annotation
    return " ".join([_NAMES.get(kind, "text"), *_limits(field)])


_NAMES: Final[dict[Any, str]] = {
    bool: "boolean",
    float: "number",
    int: "integer",
    Path: "path",
    SecretStr: "secret",
}


def _limits(field: FieldInfo) -> list[str]:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    return [
        f"{sign} {getattr(each, name):g}"
        for each in field.metadata
        for name, sign in signs.items()
        if hasattr(each, name)
    ]


def _default(value: object) -> str:
    match value:
        case None | "":
            return "none"
        case SecretStr():
            return f"`{value.get_secret_value()}`" if value.get_secret_value() else "none"
        case Path():
            return f"`{value.relative_to(HOME)}`"
        case _:
            return f"`{value}`"
