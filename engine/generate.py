"""Rows in, events out: draws one call from its beginning to its end."""

from collections.abc import Callable, Container, Iterator, Sequence

from engine.batcher import ContinuousBatch
from engine.requests import BatchRequest, Event, Row
from engine.runner import NetworkRunner


def _never_canceled() -> Container[int]:
    return ()


def generate(
    runner: NetworkRunner,
    rows: Sequence[Row],
    *,
    max_unet_rows: int,
    withdrawn: Callable[[], Container[int]] = _never_canceled,
) -> Iterator[Event]:
    """Draw the rows together, and nobody else with them. See `ContinuousBatch`.

    Every row ends in exactly one Picture or Mishap, as soon as it is done; a Step follows each of
    its steps. `withdrawn` is asked before each step which rows are not to be drawn any further.

    Raises ValueError when not even one guided row may run, and what the networks raise.
    """
    company = ContinuousBatch(runner, max_unet_rows=max_unet_rows)
    company.join(BatchRequest(rows, withdrawn))
    while not company.is_empty():
        yield from (event for _, event in company.step())
