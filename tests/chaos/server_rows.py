"""Faults of the servers: Redis and PostgreSQL restarted, killed, emptied, rung on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from celery import Celery
from redis import Redis
from servers import Server

from chaos.run import Run
from darkroom import queue
from darkroom.local import child

HINTS = "darkroom:generate"  #: the list that Celery's hints lie in


def restarted(run: Run, server: Server, *, jobs: int) -> None:
    """Asked to end in the midst of work, and started again."""
    load = run.load(jobs, prompts=["slow:0.02 a tree"])
    run.wait_for_running()
    child.end(server.running)
    run.injections += 1
    server.restart()
    run.probe()
    assert run.quiet(load)


def killed(run: Run, server: Server, *, jobs: int, times: int = 1) -> None:
    """kill -9 in the midst of work, as often as that, and started again."""
    load = run.load(jobs, prompts=["slow:0.02 a tree"])
    for _ in range(times):
        run.wait_for_running()
        server.kill()
        run.injections += 1
        server.restart()
        run.probe()
    assert run.quiet(load)


def flushed(run: Run, *, jobs: int, times: int, every_s: float) -> None:
    """FLUSHALL again and again; at last just after a submission, while nobody is awake."""
    load = run.load(jobs, prompts=["slow:0.02 a bird"])
    with Redis.from_url(run.lab.redis_url) as client:
        for _ in range(times):
            client.flushall()
            run.injections += 1
            run.lab.wait_until(lambda: False, within_s=every_s)
        assert run.quiet(load)
        flushed_before_anybody_heard(run, client)


def flushed_before_anybody_heard(run: Run, client: Redis) -> None:
    """The one hint there was is lost: only the sweeper can know."""
    for worker in run.lab.workers:
        worker.freeze()
    client.client_kill_filter(_type="normal", skipme=True)  # nobody waits at the list any more
    run.load(10)
    run.wait_for_backlog(10)
    client.flushall()
    run.injections += 1
    for worker in run.lab.workers:
        worker.thaw()
    run.lab.wait_until(lambda: run.unfinished() == 0, within_s=run.quiet_within_s)


def rung_thrice(run: Run, *, jobs: int) -> None:
    """Each hint comes three times and more, in any order and when nobody meant it."""
    with hints(run) as ring:
        load = run.load(jobs, prompts=["slow:0.01 a fish"])
        while not (load.done and run.unfinished() == 0):
            for _ in range(3):
                ring()
                run.injections += 1
            if not run.lab.wait_until(lambda: False, within_s=0.05) and run.injections > 20_000:
                break
    assert run.quiet(load)


@contextmanager
def hints(run: Run) -> Iterator[Callable[[], None]]:
    """A call puts a genuine hint into the list."""
    apart = run.lab.redis_url.rpartition("/")[0] + "/9"
    with Redis.from_url(apart) as elsewhere, Redis.from_url(run.lab.redis_url) as here:
        message = genuine_hint(apart, elsewhere)

        def ring() -> None:
            here.rpush(HINTS, message) if run.dice.random() < 0.5 else here.lpush(HINTS, message)

        yield ring
        elsewhere.flushdb()


def genuine_hint(url: str, client: Redis) -> bytes:
    """What Celery puts into the list for one ring."""
    app = Celery(broker=url, set_as_current=False)
    app.conf.update(broker_transport_options={"global_keyprefix": "darkroom:"})
    app.send_task(queue.PUMP, queue=queue.GENERATE)
    app.close()
    message = client.rpop(HINTS)
    assert isinstance(message, bytes)
    return message
