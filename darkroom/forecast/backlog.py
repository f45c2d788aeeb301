"""How much there is to draw: what the number of a model's replicas follows.

A function takes the session and commits nothing; the caller's block is the transaction.
"""

from typing import Final

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from darkroom.db.tables import Dispatch
from darkroom.status import DispatchStatus

#: Goes from key to key along the index job_claim, and counts of each no more than it must: what a
#: million jobs of one key cost is what a thousand do.
_WAITING: Final = text(
    """
    WITH RECURSIVE key AS (
        (SELECT microbatch_key AS k FROM job WHERE status = 'queued' AND NOT paused
         ORDER BY microbatch_key LIMIT 1)
        UNION ALL
        SELECT (SELECT microbatch_key FROM job
                WHERE status = 'queued' AND NOT paused AND microbatch_key > key.k
                ORDER BY microbatch_key LIMIT 1)
        FROM key WHERE key.k IS NOT NULL
    )
    SELECT key.k, (SELECT count(*) FROM (SELECT FROM job WHERE status = 'queued' AND NOT paused
                                         AND microbatch_key = key.k LIMIT :most) AS counted)
    FROM key WHERE key.k IS NOT NULL
    """
)


def waiting(session: Session, *, most: int) -> dict[str, int]:
    """How many jobs of each microbatch key wait, counted up to `most`."""
    return {row[0]: row[1] for row in session.execute(_WAITING, {"most": most})}


def under_way(session: Session) -> dict[str, int]:
    """How many microbatches of each key are being drawn."""
    drawn = (
        select(Dispatch.microbatch_key, func.count())
        .where(Dispatch.status == DispatchStatus.RUNNING)
        .group_by(Dispatch.microbatch_key)
    )
    return {row[0]: row[1] for row in session.execute(drawn)}
