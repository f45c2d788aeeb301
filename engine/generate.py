"""Rows in, events out: draws one call from its beginning to its end."""

from collections.abc import Callable, Container, Iterator, Sequence

from engine.batcher import Company
from engine.requests import Call, Event, Row
from engine.runner import NetworkRunner


def _nobody() -> Container[int]:
    return ()


def draw(
    runner: NetworkRunner,
    rows: Sequence[Row],
    *,
    max_unet_rows: int,
    withdrawn: Callable[[], Container[int]] = _nobody,
) -> Iterator[Event]:
    """Draw the rows together, and nobody else with them. See `Company`.

    Every row ends in exactly one Picture or Mishap, as soon as it is done; a Step follows each of
    its steps. `withdrawn` is asked before each step which rows are not to be drawn any further.

    Raises ValueError when not even one guided row may run, and what the networks raise.
    """
    company = Company(runner, max_unet_rows=max_unet_rows)
    company.join(Call(rows, withdrawn))
    while not company.is_empty():
        yield from (event for _, event in company.step())
