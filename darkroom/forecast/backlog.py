"""Backlog: queued and running work by microbatch key, from which models are scaled.

A function takes the session and commits nothing; the caller's block is the transaction.
"""

from typing import Final

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from darkroom.db.tables import Dispatch
from darkroom.status import DispatchStatus

#: A loose index scan over job_claim: it jumps from key to key and counts each key only up to
#: `:most`, so that a million jobs of one key cost as much as a thousand.
_QUEUED: Final = text(
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


def queued_jobs(session: Session, *, most: int) -> dict[str, int]:
    """Count the queued jobs of each microbatch key, up to `most`."""
    return {row[0]: row[1] for row in session.execute(_QUEUED, {"most": most})}


def running_microbatches(session: Session) -> dict[str, int]:
    """Count the running microbatches of each key."""
    running = (
        select(Dispatch.microbatch_key, func.count())
        .where(Dispatch.status == DispatchStatus.RUNNING)
        .group_by(Dispatch.microbatch_key)
    )
    return {row[0]: row[1] for row in session.execute(running)}
