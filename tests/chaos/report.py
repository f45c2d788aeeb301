"""The table that `make chaos` prints and keeps."""

import math
from collections.abc import Sequence
from pathlib import Path

from chaos.run import Result

HEAD = (
    "| row | fault | injections | jobs | lost | doubled | late writes tried / refused "
    "| recovery p50 / p95 | verdict |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|---|"
)


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def line_of(result: Result) -> str:
    recovery = "-"
    if result.recoveries:
        p50, p95 = (percentile(result.recoveries, share) for share in (0.5, 0.95))
        recovery = f"{p50:.1f} s / {p95:.1f} s"
    late = f"{result.late_tried} / {result.late_refused}" if result.late_tried else "-"
    verdict = "red" if result.violations else "green"
    notes = "".join(f"; {note}" for note in result.notes)
    cells = [
        result.row,
        result.fault,
        result.injections,
        result.jobs,
        result.lost,
        result.doubled,
        late,
        recovery,
        verdict + notes,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def table(results: Sequence[Result], *, seed: str) -> str:
    lines = [HEAD, *map(line_of, sorted(results, key=lambda result: result.row))]
    totals = (
        f"{sum(result.jobs for result in results):,} jobs, "
        f"{sum(result.injections for result in results):,} injections, "
        f"{sum(result.lost for result in results)} lost, "
        f"{sum(result.doubled for result in results)} doubled, "
        f"{sum(result.late_refused for result in results)} of "
        f"{sum(result.late_tried for result in results)} late writes refused, "
        f"{sum(result.seconds for result in results) / 60:.0f} min; seed {seed}"
    )
    return "\n".join([*lines, "", totals])


def keep(results: Sequence[Result], *, seed: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "report.md"
    file.write_text(table(results, seed=seed) + "\n")
    return file
