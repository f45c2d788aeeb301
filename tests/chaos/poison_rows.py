"""Prompts that nothing survives."""

from collections.abc import Sequence

from chaos.client import FAILS, Wanted
from chaos.run import Run


def in_company(run: Run, poisons: Sequence[str], *, company: int = 7) -> None:
    """Each poison in a microbatch of its own with so many innocent ones."""
    for number, poison in enumerate(poisons):
        size = (("width", 64 + 64 * (number % 8)), ("height", 64 + 64 * (number // 8)))
        jobs = [
            Wanted("an innocent", run.dice.randrange(2**32), fields=size) for _ in range(company)
        ]
        wrong = Wanted(f"{poison} here", 1, ends=FAILS, fields=size)
        jobs.insert(run.dice.randint(0, company), wrong)
        run.submit(*jobs)
        run.injections += 1
    assert run.quiet()
    crashes = run.lab.rows(
        "SELECT prompt, attempt, error_code FROM job WHERE label = :label AND status = 'failed'",
        label=run.label,
    )
    assert {(row.attempt, row.error_code) for row in crashes} == {(3, "crashed_worker")}
