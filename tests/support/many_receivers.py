"""Receivers of webhooks for a thousand connections at once; some never answer."""

import asyncio
import contextlib
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ReceivedPost:
    """One POST: when it came, to which path, with which id and body."""

    at: float
    path: str
    id: str
    body: bytes


@dataclass
class ManyReceivers:
    """Server whose paths answer as `reply` says: with a status, or never (None)."""

    reply: Callable[[ReceivedPost], int | None]
    port: int = 0
    posts: list[ReceivedPost] = field(default_factory=list)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@contextmanager
def many_receivers(reply: Callable[[ReceivedPost], int | None]) -> Iterator[ManyReceivers]:
    """Serve on loopback, in a thread with a loop of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    running = ManyReceivers(reply)
    started, end = threading.Event(), None

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, EOFError, asyncio.CancelledError):
                await _answer(running, reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def serve() -> None:
        nonlocal end
        server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=4096)
        running.port = server.sockets[0].getsockname()[1]
        loop, finished = asyncio.get_running_loop(), asyncio.Event()
        end = lambda: loop.call_soon_threadsafe(finished.set)  # noqa: E731
        started.set()
        await finished.wait()
        server.close()
        hanging = asyncio.all_tasks() - {asyncio.current_task()}
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait()
    try:
        yield running
    finally:
        end()
        thread.join()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def _answer(
    running: ManyReceivers, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    lines = head.split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    body = await reader.readexactly(int(headers["content-length"]))
    post = ReceivedPost(time.time(), lines[0].split(" ")[1], headers["webhook-id"], body)
    status = running.reply(post)
    running.posts.append(post)
    if status is None:
        await reader.read()  # until the other side gives up
        return
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
    await writer.drain()
