"""Public ids: the kind, then a UUIDv7 (RFC 9562), so that they sort by time."""

import re
from typing import Final

from uuid_utils import uuid7

_UUID: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)


def new_id(kind: str) -> str:
    """Return a new id, for example `job_01937b1c5e7a7cc3a1b2c3d4e5f60718`."""
    return f"{kind}_{uuid7().hex}"


def is_id(kind: str, text: str) -> bool:
    """Return whether the text has the form of `new_id(kind)`; other texts need no lookup."""
    prefix, _, rest = text.partition("_")
    return prefix == kind and _UUID.fullmatch(rest) is not None
