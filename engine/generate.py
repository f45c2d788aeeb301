"""Generation of one request, from its rows to its last event."""

from collections.abc import Callable, Container, Iterator, Sequence

from engine.batcher import ContinuousBatch
from engine.requests import BatchRequest, Row, RowEvent, never_canceled
from engine.runner import NetworkRunner


def generate(
    runner: NetworkRunner,
    rows: Sequence[Row],
    *,
    max_unet_rows: int,
    canceled: Callable[[], Container[int]] = never_canceled,
) -> Iterator[RowEvent]:
    """Generate the rows in a batch of their own. See `ContinuousBatch`.

    Each row ends with exactly one Image, RowFailed or Canceled, as soon as it is finished; a Step
    follows each of its steps. `canceled` is called before each step.

    Raises ValueError when not even one guided row may run, and what the networks raise.
    """
    batch = ContinuousBatch(runner, max_unet_rows=max_unet_rows)
    batch.add(BatchRequest(rows, canceled))
    while not batch.is_empty():
        yield from (event for _, event in batch.step())
