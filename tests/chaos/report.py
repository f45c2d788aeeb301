"""The tables that `make chaos` prints and keeps."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.run import FaultResult
from tests.chaos.system import LEASE_S

HEAD = (
    "| row | fault | injections | jobs | lost | duplicated | late writes tried / refused "
    "| recovery p50 / p95 | s | I1 to I9 |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|--:|---|"
)
CONTROLS = "| control | guard removed | jobs | found | must be red |\n|---|---|--:|---|---|"
KILLED_WORKERS = "F01"  #: the row whose recoveries are those of killed workers' microbatches


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def p50_p95(values: Sequence[float]) -> str:
    p50, p95 = (percentile(values, share) for share in (0.5, 0.95))
    return f"{p50:.1f} s / {p95:.1f} s"


def line_of(result: FaultResult) -> str:
    if result.skipped:
        return f"| {result.row} | {result.fault} |{' - |' * 7} skipped: {result.skipped} |"
    notes = "".join(f"; {note}" for note in result.notes)
    cells = [
        result.row,
        result.fault,
        result.injections,
        result.jobs,
        result.lost,
        result.duplicated,
        f"{result.late_tried} / {result.late_refused}" if result.late_tried else "-",
        p50_p95(result.recoveries) if result.recoveries else "-",
        round(result.seconds),
        (f"red ({kinds(result)})" if result.violations else "green") + notes,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def kinds(result: FaultResult) -> str:
    """How many violations of which invariant."""
    counted = Counter(violation.invariant for violation in result.violations)
    return ", ".join(f"{count} x {name}" for name, count in sorted(counted.items())) or "nothing"


def control_line_of(result: FaultResult) -> str:
    blind = ", ".join(sorted(result.must_find - result.found))
    verdict = f"BLIND: {blind} did not see it" if blind else "red, as it must be"
    cells = [result.row, result.fault, result.jobs, kinds(result), verdict]
    return f"| {' | '.join(map(str, cells))} |"


def totals(rows: Sequence[FaultResult], *, seed: str) -> str:
    late = (sum(row.late_refused for row in rows), sum(row.late_tried for row in rows))
    killed = [s for row in rows if row.row == KILLED_WORKERS for s in row.recoveries]
    said = [
        f"{sum(row.jobs for row in rows):,} jobs",
        f"{sum(row.injections for row in rows):,} injections",
        f"{sum(row.lost for row in rows)} lost",
        f"{sum(row.duplicated for row in rows)} duplicated",
        f"{late[0]} of {late[1]} late writes refused",
    ]
    if killed:
        limit = f"limit {LEASE_S + 5} s"
        said.append(f"{len(killed)} killed workers' microbatches recovered in {p50_p95(killed)}")
        said[-1] += f" (p50 / p95, {limit})"
    return f"{', '.join(said)}; {sum(row.seconds for row in rows) / 60:.0f} min; seed {seed}"


def table(results: Sequence[FaultResult], *, seed: str) -> str:
    rows = sorted((each for each in results if not each.must_find), key=lambda each: each.row)
    controls = [each for each in results if each.must_find]
    lines = [HEAD, *map(line_of, rows), "", totals(rows, seed=seed)]
    if controls:
        lines += ["", CONTROLS, *map(control_line_of, controls)]
    return "\n".join(lines)


def keep(results: Sequence[FaultResult], *, seed: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "report.md"
    file.write_text(table(results, seed=seed) + "\n")
    return file
