"""Parameters that several routes share, and the cursor of the next page."""

from collections.abc import Sequence
from typing import Annotated, Protocol

from fastapi import Path, Query

JobId = Annotated[str, Path(description="`id` of a job.")]
BatchId = Annotated[str, Path(description="`id` of a batch.")]
Limit = Annotated[int, Query(ge=1, le=100, description="Items per page, 1 to 100.")]
Cursor = Annotated[
    str | None,
    Query(
        pattern=r"^(job|bat)_[0-9a-f]{32}$",
        description="`next_cursor` of the page before. Default: the first page.",
    ),
]


class _Row(Protocol):
    @property
    def id(self) -> str: ...


def next_cursor(found: Sequence[_Row], limit: int) -> str | None:
    """Return the id of the page's last row, if `found` holds a row more than the page."""
    return found[limit - 1].id if len(found) > limit else None
