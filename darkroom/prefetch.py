"""Ordered read-ahead in threads."""

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
    """Yield each item with the result of `work`, in order; take items as results are read.

    `ThreadPoolExecutor.map` would take all items and keep all results at once.
    """
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            pending.append((item, pool.submit(work, item)))
            if len(pending) == threads:
                first, result = pending.popleft()
                yield first, result.result()
        for item, result in pending:
            yield item, result.result()


def prefetch(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items in order; a thread computes the next one while one is in use."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(_next, iterator)
        while item := upcoming.result():
            upcoming = pool.submit(_next, iterator)
            yield item[0]


def _next(iterator: Iterator[Item]) -> list[Item]:
    """Return the next item in a list, empty at the end."""
    return [*islice(iterator, 1)]
