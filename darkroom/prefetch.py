"""Work done by other threads, a little ahead of whoever wants the results."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ordered(
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


def prefetch(items: Iterable[Item]) -> Iterator[Item]:
    """The items in order; while one is in use, a thread makes the next, and no more than that."""
    left = iter(items)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(_next, left)
        while item := coming.result():
            coming = pool.submit(_next, left)
            yield item[0]


def _next(left: Iterator[Item]) -> list[Item]:
    """The next one, or nothing."""
    return [*islice(left, 1)]
