"""Backlog of each model, in jobs and in microbatches."""

from darkroom.forecast import backlog
from workers.deploy.backlog_reporter import microbatches

KEY = "darkroom-demo@{}/{}x{}/float32"


def key(registry, side):
    return KEY.format(registry.models["darkroom-demo"].revision, side, side)


def test_queued_jobs_are_counted_by_key_up_to_a_limit(sessions, queue_jobs, registry):
    queue_jobs(*[{"width": 64, "height": 64}] * 5, *[{"width": 128, "height": 128}] * 3)
    with sessions.begin() as session:
        found = {key(registry, 64): 5, key(registry, 128): 3}
        assert backlog.queued_jobs(session, most=100) == found
        assert backlog.queued_jobs(session, most=4) == found | {key(registry, 64): 4}


def test_an_empty_queue_has_no_backlog(sessions, registry):
    with sessions.begin() as session:
        assert backlog.queued_jobs(session, most=100) == backlog.running_microbatches(session) == {}
        assert microbatches(session, registry) == {"darkroom-demo": 0, "darkroom-demo-v1": 0}


def test_a_running_microbatch_counts_as_one(sessions, queue_jobs, claim, registry):
    queue_jobs(*[{}] * 20)
    assert len(claim()) == 8
    with sessions.begin() as session:
        assert backlog.running_microbatches(session) == {key(registry, 256): 1}
        assert microbatches(session, registry)["darkroom-demo"] == 1 + 2  # 8, and 12 in two


def test_each_revision_counts_for_its_own_model(sessions, queue_jobs, registry):
    old = registry.models["darkroom-demo-v1"].revision
    queue_jobs({}, *[{"model": f"darkroom-demo@{old}"}] * 9)
    with sessions.begin() as session:
        assert microbatches(session, registry) == {"darkroom-demo": 1, "darkroom-demo-v1": 2}
