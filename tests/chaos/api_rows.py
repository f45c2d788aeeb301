"""Faults of the API and of its clients: killed in mid-answer, asked twice, flooded, cancelled."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tests.chaos.client import ExpectedImage, RequestLoad, SentRequest
from tests.chaos.report import percentile
from tests.chaos.run import FaultRun

ENDS_IF_CANCELED = frozenset({"canceled", "succeeded"})


def killed_in_answer(run: FaultRun, points: Sequence[str], *, jobs: int, every: int) -> None:
    """The API dies at each so manieth submission, before its commit or between that and the 202."""
    for point in points:
        deaths = run.system.restarts
        with run.system.api_with({"DARKROOM_FAULT_POINT": f"{point}:{every}"}):
            load = run.load(jobs, prompts=["slow:0.02 a letter"], largest=8)
            assert run.system.wait_until(lambda load=load: load.done, within_s=240)
            run.injections += run.system.restarts - deaths
    unknown = sum(each.unknown for each in run.client.submissions)
    run.require(f"{unknown} requests unanswered, each asked again", holds=unknown > 0)
    assert run.quiet(load)


def asked_at_once(run: FaultRun, *, rounds: int, clients: int = 50) -> None:
    """One key, many clients: half of the rounds all say the same, half say two things."""
    with ThreadPoolExecutor(clients) as crowd:
        for number in range(rounds):
            texts = ["a door"] if number % 2 else ["a door", "a window"]
            answers = ask_at_once(run, crowd, texts, clients)
            run.injections += 1
            good = [answer for answer in answers if answer.status_code in {200, 202}]
            refused = [answer for answer in answers if answer.status_code == 409]
            assert len(good) + len(refused) == clients
            assert len({answer.content for answer in good}) == 1
            assert bool(refused) == (len(texts) > 1)
    assert run.quiet()


def ask_at_once(
    run: FaultRun, crowd: ThreadPoolExecutor, texts: Sequence[str], clients: int
) -> list:
    seed = run.rng.randrange(2**32)
    submission = SentRequest(0, [ExpectedImage(texts[0], seed)], as_batch=False)
    ready = threading.Barrier(clients)

    def ask(number: int):
        [wanted] = submission.jobs
        spoken = SentRequest(
            0, [ExpectedImage(texts[number % len(texts)], wanted.seed)], as_batch=False
        )
        spoken.key = submission.key
        path, request = run.client._request(spoken)
        ready.wait()
        return spoken, run.client.post(0, path, **request)

    asked = list(crowd.map(ask, range(clients)))
    for spoken, answer in asked:
        if answer.status_code in {200, 202}:
            submission.jobs = spoken.jobs  # whichever came first
            submission.ids.add(answer.json()["id"])
    run.client.submissions.append(submission)
    return [answer for _, answer in asked]


def canceled(run: FaultRun, *, batches: int, size: int) -> None:
    """Batches are canceled while their rows run, again, and once they have ended."""
    for _ in range(batches):
        wanted = [
            ExpectedImage("slow:0.3 a ship", run.rng.randrange(2**32), ends=ENDS_IF_CANCELED)
            for _ in range(size)
        ]
        batch_id = run.submit(*wanted)
        assert run.system.wait_until(lambda batch_id=batch_id: is_drawn(run, batch_id))
        answers = [run.client.post(0, f"/v1/batches/{batch_id}/cancel") for _ in range(2)]
        run.injections += 2
        assert run.quiet()
        before = run.client.get(f"/v1/batches/{batch_id}").json()
        answers.append(run.client.post(0, f"/v1/batches/{batch_id}/cancel"))
        assert {answer.status_code for answer in answers} <= {200, 202, 409}, answers
        assert run.client.get(f"/v1/batches/{batch_id}").json() == before
    both = run.system.value(
        "SELECT count(*) FROM job WHERE label = :label AND"
        " (SELECT count(DISTINCT type) FROM event WHERE job_id = job.id"
        "  AND type IN ('job.canceled', 'job.succeeded')) > 1",
        label=run.label,
    )
    run.require(f"{both} rows both canceled and succeeded", holds=both == 0)


def is_drawn(run: FaultRun, batch_id: str) -> bool:
    running = "SELECT count(*) FROM job WHERE batch_id = :id AND status = 'running'"
    return int(str(run.system.value(running, id=batch_id))) > 0


def flooded(run: FaultRun, *, jobs: int, probes: int) -> None:
    """One tenant floods; each job that the other posts is in one of the next claims."""
    flood = [
        SentRequest(
            0, [ExpectedImage("slow:0.02 a wave", seed) for seed in range(at, at + 1000)], True
        )
        for at in range(0, jobs, 1000)
    ]
    load = RequestLoad(run.client, flood, threads=2)
    run.wait_for_backlog(min(jobs // 2, 1000))
    run.injections += 1
    slots = 2 * len(run.system.workers)
    between: list[int] = []
    for _ in range(probes):
        if run.unfinished() < 100:
            break
        job_id = run.submit(ExpectedImage("slow:0.02 a cup", run.rng.randrange(2**32)), tenant=1)
        assert run.system.wait_until(lambda job_id=job_id: run.status(job_id) == "succeeded")
        between.append(claims_before(run, job_id))
    median = percentile(between, 0.5)
    what = f"{len(between)} jobs of the other tenant waited for {median} claims (median) and "
    what += f"{max(between)} at most, of {slots} slots"
    run.require(what, holds=max(between) <= 2 * slots)
    assert run.quiet(load)


def claims_before(run: FaultRun, job_id: str) -> int:
    """How many microbatches others began between its commit and its own."""
    between = """SELECT count(*) FROM dispatch, job, dispatch own
        WHERE job.id = :id AND own.id = job.dispatch_id
        AND dispatch.created_at > job.created_at AND dispatch.id < own.id"""
    return int(str(run.system.value(between, id=job_id)))
