"""The short selection, a part of `make test`: some rows of the matrix on real processes."""

import pytest

from tests.chaos import poison_rows, server_rows, worker_rows

pytestmark = pytest.mark.timeout(300)


def test_f01_a_worker_killed_at_a_named_line(row):
    with row("F01", "worker killed after its claim, and before its settlement commits") as run:
        worker_rows.killed_at(run, ["after-claim", "before-settle-commit"])


def test_f13_redis_restarts(row, backing_servers):
    with row("F13", "Redis restarted, nothing kept") as run:
        server_rows.restarted(run, backing_servers.redis, jobs=80)


def test_f15_redis_flushed(row):
    with row("F15", "FLUSHALL") as run:
        server_rows.flushed(run, jobs=80, times=3, every_s=0.3)


def test_f19_postgresql_killed(row, backing_servers):
    with row("F19", "PostgreSQL kill -9, all processes") as run:
        server_rows.killed(run, backing_servers.postgres, jobs=80)


def test_f38_every_hint_three_times(row):
    with row("F38", "hints repeated and out of order") as run:
        server_rows.hinted_thrice(run, jobs=120)


def test_f40_poison_in_a_microbatch_of_eight(row):
    with row("F40", "a prompt that kills its replica") as run:
        poison_rows.in_a_microbatch(run, ["poison:kill"])
