"""A file is imported while API and workers are killed."""

import csv
import io
import signal
import threading

import httpx2
import pytest
from sqlalchemy import text

from tests.chaos.client import SIZE
from tests.support.api_server import serve

pytestmark = pytest.mark.timeout(300)

ROWS = 20_000
BAD = frozenset(range(50, ROWS + 1, 100))
VALID = [number for number in range(1, ROWS + 1) if number not in BAD]


def file():
    written = io.StringIO(newline="")
    writer = csv.writer(written)
    writer.writerow(["prompt", "seed", "steps", "width", "height"])
    for number in range(1, ROWS + 1):
        steps = 0 if number in BAD else 1
        writer.writerow(["a red apple", number, steps, SIZE["width"], SIZE["height"]])
    return written.getvalue().encode()


def copying(system):
    """Return whether a COPY of a file's rows is under way."""
    statement = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'COPY job %'"
    return bool(system.value(statement + " AND state <> 'idle' AND datname = current_database()"))


def test_workers_killed_in_mid_import_cost_no_row_and_double_none(system, tmp_path):
    """The API stands still in the middle of the file while they die, then goes on."""
    process, url = serve(system.environment(), tmp_path / "log")
    headers = {"Authorization": f"Bearer {system.keys[0]}", "Content-Type": "text/csv"}
    answers = []
    with httpx2.Client(base_url=url, headers=headers, timeout=120) as client:

        def post(body, **query):
            answers.append(client.post("/v1/batches", content=body, params=query).json())

        post("prompt,width,height,steps\n" + "slow:0.2 a cat,64,64,1\n" * 100)
        sending = threading.Thread(target=post, args=(file(),), kwargs={"on_error": "skip"})
        sending.start()
        assert system.wait_until(lambda: copying(system))
        process.send_signal(signal.SIGSTOP)
        killed = [worker.running.process.pid for worker in system.workers]
        for worker in system.workers:
            worker.kill()
        system.supervise()
        process.send_signal(signal.SIGCONT)
        sending.join()
        assert killed != [worker.running.process.pid for worker in system.workers]
        batch = answers[1]
        assert batch["counts"]["queued"] == len(VALID)
        succeeded = "SELECT count(*) FROM job WHERE batch_id = :id AND status = 'succeeded'"
        assert system.wait_until(
            lambda: system.value(succeeded, id=batch["id"]) >= 20, within_s=120
        )
        client.post(f"/v1/batches/{batch['id']}/cancel")
    process.kill()
    process.wait()
    assert system.wait_until(lambda: unfinished(system, batch["id"]) == 0)
    with system.sessions.begin() as session:
        rows = "SELECT row_number FROM job WHERE batch_id = :id ORDER BY row_number"
        assert session.scalars(text(rows), {"id": batch["id"]}).all() == VALID
        ends = (
            "SELECT count(*), count(DISTINCT job_id) FROM event WHERE batch_id = :id AND "
            "type IN ('job.succeeded', 'job.canceled')"
        )
        assert tuple(session.execute(text(ends), {"id": batch["id"]}).one()) == (len(VALID),) * 2


def unfinished(system, batch_id):
    statement = "SELECT count(*) FROM job WHERE batch_id = :id AND finished_at IS NULL"
    return system.value(statement, id=batch_id)
