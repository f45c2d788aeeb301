"""The whole matrix but for what needs Ray and Triton: `make chaos`."""

import subprocess

import pytest

from tests.chaos import api_rows, network_rows, poison_rows, server_rows, worker_rows
from tests.chaos.network import segment
from tests.chaos.replica import POISONS
from tests.chaos.run import skipped

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


def test_f01_workers_killed_at_every_named_line(system, row):
    with (
        system.listening() as receiver,
        row("F01", "worker killed at 5 named lines, 5 times each", receiver=receiver) as run,
    ):
        worker_rows.killed_again_and_again(run, rounds=5, jobs_each=50)


def test_f02_no_worker_at_all(row):
    with row("F02", "all workers killed, back after 30 s") as run:
        worker_rows.all_killed(run, jobs=1500, down_s=30)


def test_f03_a_worker_sleeps_past_its_lease(row):
    with row("F03", "worker stopped for longer than its lease, 4 times") as run:
        for _ in range(4):
            worker_rows.frozen(run, jobs=150)


def test_f04_workers_are_rolled(row):
    with row("F04", "rolling restart of the workers, 10 times") as run:
        worker_rows.rolled(run, jobs=1000, times=10)


def test_f05_the_api_is_killed_in_mid_answer(row):
    points = ["before-submit-commit", "after-submit-commit"]
    with row("F05", "API killed before and after its commit") as run:
        api_rows.killed_in_answer(run, points, jobs=160, every=10)


@pytest.mark.parametrize("fault", ["restarted", "killed"])
def test_f13_f14_redis(row, backing_servers, fault):
    name = {"restarted": "F13", "killed": "F14"}[fault]
    with row(name, f"Redis {fault}, nothing kept, 5 times") as run:
        getattr(server_rows, fault)(run, backing_servers.redis, jobs=800, times=5)


def test_f15_redis_flushed(row):
    with row("F15", "FLUSHALL once a second for 20 s") as run:
        server_rows.flushed(run, jobs=1500, times=20, every_s=1)


def test_f16_redis_is_full(row):
    with row("F16", "Redis full, nothing evicted") as run:
        server_rows.filled(run, jobs=400)


def test_f17_garbage_in_redis(row):
    with row("F17", "garbage of 20 forms in every list and key of Redis") as run:
        server_rows.garbled(run, jobs=400)


def test_f18_postgresql_restarts(row, backing_servers):
    with row("F18", "PostgreSQL restarted (fast), 5 times") as run:
        server_rows.restarted(run, backing_servers.postgres, jobs=800, times=5)


def test_f19_postgresql_killed(row, backing_servers):
    with row("F19", "PostgreSQL kill -9, all processes, 5 times") as run:
        server_rows.killed(run, backing_servers.postgres, jobs=800, times=5)


def test_f20_all_sessions_end(row):
    with row("F20", "all sessions of PostgreSQL ended; one backend killed") as run:
        server_rows.cut_short(run, jobs=800, times=5)


def test_f22_postgresql_is_slow(row):
    with row("F22", "jobs locked for 30 s; then 200 ms for each message") as run:
        server_rows.locked(run, jobs=300, for_s=30)
        server_rows.delayed(run, jobs=100, delay_s=0.2)


def test_f24_deadlocks(row):
    with row("F24", "deadlocks; serializable as the database's default") as run:
        server_rows.deadlocked(run, jobs=300, times=12)


def test_f32_clocks_jump(row, record):
    fault = "clocks of API and a worker jump by +2 h, -2 h, +3 d"
    if network_rows.FAKETIME is None:
        record(skipped("F32", fault, "no libfaketime here"))
        pytest.skip("no libfaketime here: apt install libfaketime")
    with row("F32", fault) as run:
        network_rows.jumping(run, jobs=120, jumps=["+7200", "-7200", "+259200"])


@pytest.fixture
def wire(request, record):
    """A network that can be cut; where that is not allowed, a line of the table says so."""
    row, fault = request.param
    try:
        made = segment()
        with made as cable:
            yield cable
    except (OSError, subprocess.CalledProcessError) as error:
        record(skipped(row, fault, f"no network namespace here ({error})"))
        pytest.skip(f"no network namespace here: {error}")


CUT = ("F34", "worker cut off from its servers, both ways and one way")
HALF_OPEN = ("F37", "half-open connections: the peer vanished")


@pytest.mark.parametrize("wire", [CUT], indirect=True, ids=["F34"])
def test_f34_a_worker_is_cut_off(row, wire):
    ways = [{"out": True, "back": True}, {"out": True, "back": False}, {"out": False, "back": True}]
    with row(*CUT) as run:
        network_rows.cut_off(run, wire, jobs=200, ways=ways)


@pytest.mark.parametrize("wire", [HALF_OPEN], indirect=True, ids=["F37"])
def test_f37_half_open_connections(row, wire):
    with row(*HALF_OPEN) as run:
        network_rows.vanished(run, wire, jobs=200)


def test_f38_every_hint_three_times(row):
    with row("F38", "hints repeated and out of order") as run:
        server_rows.hinted_thrice(run, jobs=1500)


def test_f39_one_key_fifty_clients(row):
    with row("F39", "50 clients at once with one key, 40 times") as run:
        api_rows.asked_at_once(run, rounds=40)


def test_f40_poison_of_every_kind(row):
    with row("F40", f"prompts that {', '.join(word.partition(':')[2] for word in POISONS)}") as run:
        poison_rows.in_a_microbatch(run, list(POISONS))


def test_f41_a_tenth_is_poison(row):
    with row("F41", "10 % poison in 1,000 jobs") as run:
        poison_rows.among_many(run, jobs=1000, share=0.1)


def test_f43_batches_are_canceled(row):
    with row("F43", "batches canceled while their rows run, twice, and afterwards") as run:
        api_rows.canceled(run, batches=8, size=64)


def test_f49_one_tenant_floods(row):
    with row("F49", "one tenant floods, another posts single jobs") as run:
        api_rows.flooded(run, jobs=3000, probes=15)


def test_f50_the_power_goes(system, row):
    with (
        system.listening() as receiver,
        row("F50", "SIGKILL of everything at once, 3 times", receiver=receiver) as run,
    ):
        server_rows.powered_off(run, jobs=500, times=3)
