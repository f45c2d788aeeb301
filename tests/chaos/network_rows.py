"""Faults between a worker and its servers: one that is cut off, a clock that jumps."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from tests.chaos.network import OURS, NetworkSegment, TcpProxy, connections_to, moved
from tests.chaos.run import FaultRun
from tests.chaos.worker_rows import wait_for_recovery
from tests.support.servers import ServerProcess

NOTICED_WITHIN_S = 5
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


@contextmanager
def relayed(run: FaultRun) -> Iterator[tuple[dict[str, str], Sequence[TcpProxy]]]:
    """Settings of a process that reaches PostgreSQL, Redis and S3 over relays; and the relays."""
    urls = {
        "DARKROOM_DATABASE_URL": run.system.database_url,
        "DARKROOM_REDIS_URL": run.system.redis_url,
        "DARKROOM_S3_ENDPOINT_URL": run.system.backing_servers.s3_settings.endpoint_url,
    }
    relays = [TcpProxy(urlsplit(url).port, host=OURS) for url in urls.values()]
    try:
        yield (
            {
                name: moved(url, OURS, relay.port)
                for (name, url), relay in zip(urls.items(), relays, strict=True)
            },
            relays,
        )
    finally:
        for relay in relays:
            relay.close()


def cut_off(
    run: FaultRun, segment: NetworkSegment, *, jobs: int, ways: Sequence[dict[str, bool]]
) -> None:
    """A worker behind a cable that is pulled, whole or one way; others go on with what it held."""
    with relayed(run) as (settings, relays):
        worker = run.system.start_worker(settings, within=segment.inside, keep=False)
        run.system.wait_ready(worker)
        for way in ways:
            load = run.load(jobs, prompts=["slow:0.3 a hill"], largest=40)
            run.wait_for_running([worker])
            pull(run, segment, worker, relays[0], way)
            assert run.quiet(load)
        run.system.stop_worker(worker)


def pull(
    run: FaultRun,
    segment: NetworkSegment,
    worker: ServerProcess,
    relay: TcpProxy,
    way: dict[str, bool],
) -> None:
    cut_at, held, jobs = run.system.now(), run.held_by(worker), run.jobs_of(worker)
    before = connections_to(worker.running.process.pid, relay.port)
    refused = run.refused(worker)
    segment.cut(**way)
    run.injections += 1
    noticed_s = until_gone(run, worker, relay, before)
    wait_for_recovery(run, cut_at, jobs)
    segment.recover()
    expired = "SELECT count(*) FROM dispatch WHERE id = ANY(:ids) AND status = 'expired'"
    late = int(str(run.system.value(expired, ids=held)))
    run.late_tried += late
    run.system.wait_until(lambda: run.refused(worker) - refused >= late, within_s=40)
    run.late_refused += min(late, run.refused(worker) - refused)
    what = " and ".join(name for name, pulled in way.items() if pulled)
    run.require(f"{what}: noticed after {noticed_s:.1f} s", holds=noticed_s <= NOTICED_WITHIN_S)
    run.wait_for_backlog(0)


def until_gone(run: FaultRun, worker: ServerProcess, relay: TcpProxy, before: set[str]) -> float:
    """How long a worker took to drop all connections that led to a database no more."""
    began = time.monotonic()
    pid = worker.running.process.pid
    run.system.wait_until(lambda: not before & connections_to(pid, relay.port), within_s=30)
    return time.monotonic() - began


def vanished(run: FaultRun, segment: NetworkSegment, *, jobs: int) -> None:
    """Have the peer of idle connections forget them while the network drops its answers."""
    with relayed(run) as (settings, relays):
        worker = run.system.start_worker(settings, within=segment.inside, keep=False)
        run.system.wait_ready(worker)
        load = run.load(jobs, prompts=["slow:0.1 a lake"], largest=40)
        run.wait_for_running([worker])
        before = connections_to(worker.running.process.pid, relays[0].port)
        segment.cut()
        for relay in relays:
            relay.drop()
        run.injections += 1
        noticed_s = until_gone(run, worker, relays[0], before)
        segment.recover()
        what = f"{len(before)} half-open connections dropped after {noticed_s:.1f} s"
        run.require(what, holds=noticed_s <= NOTICED_WITHIN_S)
        run.probe()
        assert run.quiet(load)
        run.system.stop_worker(worker)


def jumping(run: FaultRun, *, jobs: int, jumps: Sequence[str]) -> None:
    """The clocks of the API, a worker and the sender of webhooks jump while they work."""
    file = run.system.folder / "clock"
    file.write_text("+0")
    faked = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    worker = run.system.start_worker(faked, keep=False)
    with run.system.api_with(faked):
        run.system.wait_ready(worker)
        for jump in jumps:
            file.write_text("+0")  # storage refuses clocks that are off by more than 15 minutes
            run.system.wait_until(lambda: False, within_s=2)
            load = run.load(jobs, prompts=["slow:0.2 a clock"], largest=40)
            run.wait_for_running([worker])
            file.write_text(jump)
            run.injections += 1
            assert run.quiet(load)
        file.write_text("+0")
        run.system.stop_worker(worker)
    stolen = run.system.value(
        "SELECT count(*) FROM dispatch WHERE status = 'expired' AND finished_at < leased_until"
    )
    negative = run.system.value(
        "SELECT count(*) FROM job WHERE label = :label"
        " AND (finished_at < started_at OR started_at < created_at OR inference_ms < 0)",
        label=run.label,
    )
    run.require(f"{stolen} leases ended before their time", holds=stolen == 0)
    run.require(f"{negative} negative durations", holds=negative == 0)
