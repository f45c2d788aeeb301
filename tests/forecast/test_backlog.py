"""How much there is to draw, and how many replicas that asks for."""

from darkroom.forecast import backlog
from workers.deploy.backlog_reporter import microbatches

KEY = "darkroom-demo@{}/{}x{}/float32"


def key(registry, side):
    return KEY.format(registry.models["darkroom-demo"].revision, side, side)


def test_what_waits_is_counted_by_key_and_no_further_than_asked(sessions, queue_jobs, registry):
    queue_jobs(*[{"width": 64, "height": 64}] * 5, *[{"width": 128, "height": 128}] * 3)
    with sessions.begin() as session:
        found = {key(registry, 64): 5, key(registry, 128): 3}
        assert backlog.waiting(session, most=100) == found
        assert backlog.waiting(session, most=4) == found | {key(registry, 64): 4}


def test_nothing_waits_in_an_empty_queue(sessions, registry):
    with sessions.begin() as session:
        assert backlog.waiting(session, most=100) == backlog.under_way(session) == {}
        assert microbatches(session, registry) == {"darkroom-demo": 0, "darkroom-demo-v1": 0}


def test_a_microbatch_under_way_counts_as_one(sessions, queue_jobs, claim, registry):
    queue_jobs(*[{}] * 20)
    assert len(claim()) == 8
    with sessions.begin() as session:
        assert backlog.under_way(session) == {key(registry, 256): 1}
        assert microbatches(session, registry)["darkroom-demo"] == 1 + 2  # 8, and 12 in two


def test_each_revision_is_asked_of_its_own_model(sessions, queue_jobs, registry):
    old = registry.models["darkroom-demo-v1"].revision
    queue_jobs({}, *[{"model": f"darkroom-demo@{old}"}] * 9)
    with sessions.begin() as session:
        assert microbatches(session, registry) == {"darkroom-demo": 1, "darkroom-demo-v1": 2}
