"""Faults of the servers: restarted, killed, emptied, filled, locked, all of them at once."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx2
import psutil
import psycopg
from celery import Celery
from redis import Redis

from darkroom.local import process as child_process
from darkroom.queue import celery_app
from tests.chaos.network import TcpProxy, moved
from tests.chaos.report import percentile
from tests.chaos.run import FaultRun
from tests.support.servers import ServerProcess

HINTS = "darkroom:generate"  #: the list that Celery's hints lie in


def restarted(run: FaultRun, server: ServerProcess, *, jobs: int, times: int = 1) -> None:
    """Asked to end in the midst of work, as often as that, and started again."""
    load = run.load(jobs, prompts=["slow:0.02 a tree"])
    for _ in range(times):
        wait_for_work(run)
        child_process.stop(server.running)
        run.injections += 1
        server.restart()
        run.probe()
    assert run.quiet(load)


def killed(run: FaultRun, server: ServerProcess, *, jobs: int, times: int = 1) -> None:
    """kill -9 in the midst of work, as often as that, and started again."""
    load = run.load(jobs, prompts=["slow:0.02 a tree"])
    for _ in range(times):
        wait_for_work(run)
        server.kill()
        run.injections += 1
        server.restart()
        run.probe()
    assert run.quiet(load)


def wait_for_work(run: FaultRun) -> None:
    """Wait until a job is running, submitting more when all have finished."""
    if run.unfinished() == 0:
        run.load(100, prompts=["slow:0.05 a bush"])
    run.wait_for_running()


def flushed(run: FaultRun, *, jobs: int, times: int, every_s: float) -> None:
    """FLUSHALL again and again; at last just after a submission, while no worker is awake."""
    load = run.load(jobs, prompts=["slow:0.02 a bird"])
    with Redis.from_url(run.system.redis_url) as client:
        for _ in range(times):
            client.flushall()
            run.injections += 1
            run.system.wait_until(lambda: False, within_s=every_s)
        assert run.quiet(load)
        flushed_before_any_worker_heard(run, client)


def flushed_before_any_worker_heard(run: FaultRun, client: Redis) -> None:
    """Lose the only hint: just the reaper can find the jobs."""
    for worker in run.system.workers:
        worker.freeze()
    client.client_kill_filter(_type="normal", skipme=True)  # no worker waits at the list any more
    load = run.load(10)
    run.wait_for_backlog(10)
    assert run.system.wait_until(lambda: load.done and client.exists(HINTS))
    while client.exists(HINTS):  # a last hint may be on its way
        client.flushall()
        run.injections += 1
        run.system.wait_until(lambda: False, within_s=0.5)
    for worker in run.system.workers:
        worker.thaw()
    run.system.wait_until(lambda: run.unfinished() == 0, within_s=run.quiet_within_s)


def hinted_thrice(run: FaultRun, *, jobs: int) -> None:
    """Repeat each hint three times and more, in any order and when none was sent."""
    with hints(run) as repeat:
        load = run.load(jobs, prompts=["slow:0.01 a fish"])
        while not (load.done and run.unfinished() == 0):
            for _ in range(3):
                repeat()
                run.injections += 1
            if not run.system.wait_until(lambda: False, within_s=0.05) and run.injections > 20_000:
                break
    assert run.quiet(load)


@contextmanager
def hints(run: FaultRun) -> Iterator[Callable[[], None]]:
    """A call puts a genuine hint into the list."""
    apart = run.system.redis_url.rpartition("/")[0] + "/9"
    with Redis.from_url(apart) as elsewhere, Redis.from_url(run.system.redis_url) as here:
        message = genuine_hint(apart, elsewhere)

        def notify_workers() -> None:
            here.rpush(HINTS, message) if run.rng.random() < 0.5 else here.lpush(HINTS, message)

        yield notify_workers
        elsewhere.flushdb()


def genuine_hint(url: str, client: Redis) -> bytes:
    """What Celery puts into the list for one hint."""
    app = Celery(broker=url, set_as_current=False)
    app.conf.update(broker_transport_options={"global_keyprefix": "darkroom:"})
    app.send_task(celery_app.PROCESS_QUEUE, queue=celery_app.GENERATE_QUEUE)
    app.close()
    message = client.rpop(HINTS)
    assert isinstance(message, bytes)
    return message


def filled(run: FaultRun, *, jobs: int) -> None:
    """Redis takes nothing more; the API takes jobs all the same, and shows them."""
    load = run.load(jobs, prompts=["slow:0.02 a jug"])
    with Redis.from_url(run.system.redis_url) as client:
        wait_for_work(run)
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "100kb")  # less than it takes to be there
        run.injections += 1
        before = len(run.client.answers)
        more = run.load(jobs // 2, largest=20)
        assert run.system.wait_until(lambda: more.done)
        shown = [run.client.get(f"/v1/jobs?label={run.label}") for _ in range(5)]
        statuses = {answer.status for answer in run.client.answers[before:]}
        run.require(f"answers while full: {sorted(statuses)}", holds=statuses <= {200, 202})
        assert {answer.status_code for answer in shown} == {200}
        client.config_set("maxmemory", "0")
    run.probe()
    assert run.quiet(load)


GARBAGE = (
    *(b"garbage", b"[]", b"null", b"{}", b"0", b"", b"\x00\xff\xfe", b'"text"', b"{", b"true"),
    *(b'{"body": 1}', b'{"body": "!", "headers": {}, "properties": {}}', b"[[], {}, {}]"),
    b'{"body":"e30=","headers":{"task":"unknown"},"properties":{"delivery_tag":"1"}}',
    b'{"body":"gASVAAAA","content-type":"application/x-python-serialize","headers":{}}',
    *(b"x" * 1_000_000, b"\xf0\x9f\x92\xa9", b"1e999", b"-1", b'{"headers":{"task":[]}}'),
)


def garbled(run: FaultRun, *, jobs: int) -> None:
    """Garbage in every list, set and key there is; who cannot bear it is started again."""
    load = run.load(jobs, prompts=["slow:0.02 a bin"])
    with Redis.from_url(run.system.redis_url) as client:
        restarts = run.system.restarts
        for at in range(0, len(GARBAGE), 5):
            wait_for_work(run)
            for piece in GARBAGE[at : at + 5]:
                client.rpush(HINTS, piece)
                garble(client, piece)
                run.injections += 1
            run.system.wait_until(lambda: False, within_s=1)
            run.probe()
        assert run.quiet(load)
        run.system.wait_ready()
        assert run.system.wait_until(lambda: not client.exists(HINTS)), "garbage is left"
        run.notes.append(f"workers started again: {run.system.restarts - restarts}")


def garble(client: Redis, piece: bytes) -> None:
    """Into whatever is there, by its kind."""
    for key in client.keys("*"):
        match client.type(key):
            case b"list":
                client.rpush(key, piece)
            case b"set":
                client.sadd(key, piece)
            case b"hash":
                client.hset(key, piece, piece)
            case b"zset":
                client.zadd(key, {piece: 0})
            case b"string":
                client.set(key, piece)


def cut_short(run: FaultRun, *, jobs: int, times: int) -> None:
    """All sessions are ended at once; at last one backend is killed, which ends all others too."""
    load = run.load(jobs, prompts=["slow:0.02 a rope"])
    end_all = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    opened = "SELECT sessions FROM pg_stat_database WHERE datname = current_database()"
    storms = []
    for _ in range(times):
        wait_for_work(run)
        before = int(str(run.system.value(opened)))
        run.system.value(end_all)
        run.injections += 1
        run.system.wait_until(lambda: False, within_s=1)
        storms.append(int(str(run.system.value(opened))) - before)
        run.probe()
    pools = 12 * len(run.system.processes)
    what = f"at most {max(storms)} connections in the second after, pools hold {pools}"
    run.require(what, holds=max(storms) <= 2 * pools)
    wait_for_work(run)
    kill_a_backend(run)
    run.probe()
    assert run.quiet(load)


def kill_a_backend(run: FaultRun) -> None:
    postmaster = psutil.Process(run.system.backing_servers.postgres.running.process.pid)
    name = run.system.database_url.rpartition("/")[2]
    ours = [each for each in postmaster.children() if name in " ".join(each.cmdline())]
    run.rng.choice(ours).kill()
    run.injections += 1


def locked(run: FaultRun, *, jobs: int, for_s: float) -> None:
    """Lock the table of jobs: the API stays alive and says 503 when it takes too long."""
    load = run.load(jobs, prompts=["slow:0.02 a key"])
    wait_for_work(run)
    with psycopg.connect(run.system.database_url) as blocking, beating(run) as beats:
        blocking.execute("LOCK TABLE job IN ACCESS EXCLUSIVE MODE")
        run.injections += 1
        run.load(40, largest=4)
        deadline = time.monotonic() + for_s
        while time.monotonic() < deadline:  # nothing may be asked of the table meanwhile
            run.system.supervise()
            time.sleep(0.05)
        blocking.rollback()
    p99_ms = 1000 * percentile(beats, 0.99)
    what = f"/healthz p99 {p99_ms:.0f} ms of {len(beats)} while it was locked"
    run.require(what, holds=p99_ms < 100)
    run.probe()
    assert run.quiet(load)


@contextmanager
def beating(run: FaultRun) -> Iterator[list[float]]:
    """How long each of many looks at /healthz takes, for the block."""
    took: list[float] = []
    over = threading.Event()

    def look() -> None:
        with httpx2.Client(base_url=run.system.url, timeout=30) as client:
            while not over.wait(0.02):
                began = time.monotonic()
                client.get("/healthz").raise_for_status()
                took.append(time.monotonic() - began)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield took
    finally:
        over.set()
        thread.join()


def delayed(run: FaultRun, *, jobs: int, delay_s: float) -> None:
    """Each message to PostgreSQL takes that long, for the API and for a worker."""
    relay = TcpProxy(urlsplit(run.system.database_url).port, delay_s=delay_s)
    slow = {"DARKROOM_DATABASE_URL": moved(run.system.database_url, "127.0.0.1", relay.port)}
    worker = run.system.start_worker(slow, keep=False)
    with run.system.api_with(slow), beating(run) as beats:
        run.system.wait_ready(worker)
        run.injections += 1
        load = run.load(jobs, prompts=["slow:0.02 a snail"], largest=40)
        assert run.quiet(load)
    p99_ms = 1000 * percentile(beats, 0.99)
    run.require(
        f"/healthz p99 {p99_ms:.0f} ms of {len(beats)} while it was slow", holds=p99_ms < 100
    )
    run.system.stop_worker(worker)
    relay.close()


def deadlocked(run: FaultRun, *, jobs: int, times: int) -> None:
    """Lock jobs in the other order and wait: the product's transaction is rolled back.

    Then the database's default isolation is one in which transactions that cross fail.
    """
    load = run.load(jobs, prompts=["slow:0.1 a knot"], largest=40)
    broken_off = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    before = int(str(run.system.value(broken_off)))
    with psycopg.connect(run.system.database_url) as other:
        other.execute("SET deadlock_timeout = '60s'")
        other.commit()
        for _ in range(times):
            wait_for_work(run)
            deadlock(run, other)
    deadlocks = int(str(run.system.value(broken_off))) - before
    run.injections += deadlocks
    run.require(f"{deadlocks} deadlocks", holds=deadlocks > 0)
    assert run.quiet(load)
    serialized(run, jobs=jobs)


def deadlock(run: FaultRun, other: psycopg.Connection) -> None:
    """Lock the last job of a microbatch; when its worker waits for that, lock its first."""
    held = "SELECT id FROM job WHERE label = %s AND status = 'running' ORDER BY id DESC LIMIT 8"
    ids = [row[0] for row in other.execute(held, [run.label])]
    lock = "SELECT 1 FROM job WHERE id = %s FOR UPDATE"
    for job_id in ids:
        other.execute(lock, [job_id])
        run.system.wait_until(lambda: False, within_s=0.15)
    other.rollback()


def serialized(run: FaultRun, *, jobs: int) -> None:
    name = run.system.database_url.rpartition("/")[2]
    setting = f"ALTER DATABASE {name} {{}} default_transaction_isolation"
    end_all = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = %s"
    with psycopg.connect(run.system.backing_servers.postgres.url, autocommit=True) as admin:
        admin.execute(setting.format("SET") + " = 'serializable'")
        admin.execute(end_all, [name])
        run.injections += 1
        load = run.load(jobs, prompts=["slow:0.02 a queue"], largest=40)
        quiet = run.quiet(load)
        admin.execute(setting.format("RESET"))
        admin.execute(end_all, [name])
    assert quiet


def powered_off(run: FaultRun, *, jobs: int, times: int) -> None:
    """SIGKILL to all processes and servers at once; what starts again goes on by itself."""
    for _ in range(times):
        load = run.load(jobs, prompts=["slow:0.05 a lamp"], largest=100)
        run.wait_for_running()
        everything: Sequence[ServerProcess] = (
            *run.system.processes,
            *run.system.backing_servers.servers,
        )
        for server in everything:
            server.kill()
            run.injections += 1
        began = time.monotonic()
        for server in run.system.backing_servers.servers:
            server.restart()
        run.system.supervise()
        run.system.wait_ready()
        run.notes.append(f"up after {time.monotonic() - began:.0f} s")
        run.probe()
        assert run.quiet(load)
