"""RFC 3339 timestamps as this project writes them: UTC, milliseconds, `Z`."""

from datetime import UTC, datetime


def rfc3339(moment: datetime) -> str:
    """Format an aware moment like `2026-01-31T12:00:00.000Z`."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
