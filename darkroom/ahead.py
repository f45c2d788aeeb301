"""Work on many things by several threads, a few things ahead of whoever wants the results."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], *, threads: int
) -> Iterator[tuple[Item, Result]]:
    """Each item and what `work` made of it, in order. Items are only taken as results are read.

    `ThreadPoolExecutor.map` would take all items, and keep all results, at once.
    """
    with ThreadPoolExecutor(threads) as pool:
        coming: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            coming.append((item, pool.submit(work, item)))
            if len(coming) == threads:
                first, result = coming.popleft()
                yield first, result.result()
        for item, result in coming:
            yield item, result.result()
