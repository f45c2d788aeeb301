"""Commit-message check: `area: imperative verb …` in at most 72 characters."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

LONGEST: Final = 72
TEMPORARY: Final = ("fixup! ", "squash! ", "amend! ")  # an autosquash rebase removes these
SUBJECT: Final = re.compile(r"(?P<area>[a-z][a-z0-9_./, -]*): (?P<verb>\S+)(?P<rest> .*)?")
# "added", "adding" and "adds" describe the commit; "add" is what it does when applied.
NOT_IMPERATIVE: Final = re.compile(r".*(?:ed|ing|[^su]s)")
IMPERATIVE: Final = frozenset({"bring", "embed", "exceed", "feed", "need", "proceed", "seed"})


def problems(message: str) -> list[str]:
    """Return what is wrong with a commit message, or an empty list."""
    lines = [line for line in message.splitlines() if not line.startswith("#")]
    subject = lines[0] if lines else ""
    if subject.startswith(TEMPORARY):
        return []
    found = subject_problems(subject)
    if len(lines) > 1 and lines[1].strip():
        found.append("line 2 must be empty: it separates the subject from the body")
    return found


def subject_problems(subject: str) -> list[str]:
    found = []
    if len(subject) > LONGEST:
        found.append(f"the subject has {len(subject)} characters; shorten it to {LONGEST}")
    if subject.endswith("."):
        found.append("the subject ends with a period; remove it")
    match = SUBJECT.fullmatch(subject)
    if match is None:
        found.append("write `area: verb …`, for example `queue: return suspects one by one`")
    elif not is_imperative(match["verb"]):
        found.append(f"{match['verb']!r} is no imperative; write what the commit does: `add …`")
    return found


def is_imperative(verb: str) -> bool:
    """Tell whether a verb can be an imperative, judged by its case and ending alone."""
    if verb in IMPERATIVE:
        return True
    return verb[0].islower() and NOT_IMPERATIVE.fullmatch(verb) is None


def main(arguments: Sequence[str]) -> int:
    path = Path(arguments[0])
    found = problems(path.read_text(encoding="utf-8"))
    for problem in found:
        print(f"commit message: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
