"""The whole path on real servers: a job sent over HTTP becomes an image, whichever process dies.

One stack with two workers serves all of these tests.
"""

import contextlib
import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from PIL import Image
from redis import Redis
from sqlalchemy import func, select

from darkroom.db.tables import Dispatch, Event, Job
from darkroom.generation import image_codec
from darkroom.settings import HOME
from tests.support.stack import POISON, SMALL, running_stack

pytestmark = [pytest.mark.path, pytest.mark.timeout(480)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    with running_stack(tmp_path_factory.mktemp("path") / "data", workers=2) as running:
        yield running


def statuses(jobs):
    return [job["status"] for job in jobs]


def pixels(image):
    with Image.open(io.BytesIO(image)) as opened:
        return np.asarray(opened.convert("RGB")).astype(int)


def test_a_job_becomes_the_stored_object_whose_hash_its_row_holds(stack, tmp_path):
    job_id = stack.submit(prompt="a red apple", seed=7, width=256, height=256)
    [job] = stack.wait([job_id])

    assert job["status"] == "succeeded"
    image = stack.image(job_id)
    with stack.sessions.begin() as session:
        row = session.get(Job, job_id)
        dispatch = session.get(Dispatch, row.dispatch_id)
        events = session.scalars(
            select(Event.type).where(Event.job_id == job_id).order_by(Event.id)
        ).all()
    stored = stack.data_dir / "objects" / "darkroom" / row.image_key
    assert stored.read_bytes() == image
    assert hashlib.sha256(image).hexdigest() == row.image_sha256 == job["image"]["sha256"]
    assert len(image) == job["image"]["bytes"]
    assert str(dispatch.id) in row.image_key
    assert (dispatch.status, dispatch.size) == ("finished", job["microbatch"]["size"])
    assert events == ["job.started", "job.succeeded"]
    file = tmp_path / "image.png"
    file.write_bytes(image)
    about = image_codec.read_parameters(file)
    assert (about["id"], about["seed"], about["prompt"]) == (job_id, 7, "a red apple")
    red, green, blue = pixels(image)[100:180, 100:160].mean(axis=(0, 1))
    assert red > 2 * max(green, blue)  # a red apple, in the middle


@pytest.mark.chaos
def test_an_old_revision_runs_on_demand_and_costs_nothing_before_and_after(stack, tmp_path):
    old = "67599f693183"
    replica = ("ServeReplica", "darkroom-demo-v1")
    assert not stack.find(*replica)

    job_id = stack.submit(model=f"darkroom-demo@{old}", seed=7)
    [job] = stack.wait([job_id])

    assert job["status"] == "succeeded", job
    assert job["microbatch"]["key"].startswith(f"darkroom-demo-v1@{old}/")
    file = tmp_path / "image.png"
    file.write_bytes(stack.image(job_id))
    assert image_codec.read_parameters(file)["revision"] == old
    stack.until(lambda: not stack.find(*replica), within_s=60)


def test_a_waiting_request_answers_when_the_job_has_succeeded(stack):
    answer = stack.http.post(
        "/v1/jobs", json={"prompt": "a cat"} | SMALL, headers={"Prefer": "wait=30"}
    )
    assert answer.json()["status"] == "succeeded"


@pytest.mark.parametrize("size", [2, 4, 8])
def test_an_image_does_not_depend_on_its_microbatch(stack, size):
    wanted = {"prompt": "a red apple", "seed": 7, "num_inference_steps": 6}
    alone = stack.submit(**wanted)
    stack.wait([alone])
    others = [f"a dog,{seed},{2 + seed},{1 + seed / 2}" for seed in range(1, size)]
    lines = ["prompt,seed,steps,cfg,width,height", *(f"{line},64,64" for line in others)]
    lines.insert(size // 2 + 1, "a red apple,7,6,4,64,64")
    batch = stack.http.post(
        "/v1/batches", content="\n".join(lines), headers={"Content-Type": "text/csv"}
    ).json()
    ids = [job["id"] for job in stack.http.get(batch["urls"]["jobs"]).json()["data"]]
    jobs = stack.wait(ids)

    [again] = [job for job in jobs if job["input"]["prompt"] == "a red apple"]
    assert again["microbatch"]["size"] == size
    difference = np.abs(pixels(stack.image(alone)) - pixels(stack.image(again["id"])))
    assert difference.max() <= 1


def submitted_together(stack, *steps):
    """Jobs that become one microbatch, with so many steps each."""
    rows = [f"a red apple,{seed},{count},256,256" for seed, count in enumerate(steps)]
    batch = stack.http.post(
        "/v1/batches",
        content="\n".join(["prompt,seed,steps,width,height", *rows]),
        headers={"Content-Type": "text/csv"},
    ).json()
    return [job["id"] for job in stack.http.get(batch["urls"]["jobs"]).json()["data"]]


def step_of(job):
    return (job["progress"] or {}).get("step") or 0


def test_one_job_is_canceled_out_of_a_running_microbatch(stack):
    alone = stack.submit(seed=2, num_inference_steps=10, width=256, height=256)
    stack.wait([alone])
    canceled, long, short = ids = submitted_together(stack, 50, 50, 10)
    seen = []

    def three_steps_seen():
        listed = stack.http.get("/v1/jobs?status=running").json()["data"]
        seen.extend(step_of(job) for job in listed if job["id"] == canceled and step_of(job))
        return len(set(seen)) >= 3

    stack.until(three_steps_seen, within_s=60)
    assert seen == sorted(seen)

    stack.http.post(f"/v1/jobs/{canceled}/cancel").raise_for_status()
    [gone] = stack.wait([canceled])
    other = stack.job(long)
    assert (gone["status"], other["status"]) == ("canceled", "running")
    assert step_of(other) < 50
    jobs = stack.wait(ids)
    assert statuses(jobs) == ["canceled", "succeeded", "succeeded"]
    assert {job["microbatch"]["size"] for job in jobs} == {3}
    assert jobs[2]["finished_at"] < jobs[1]["finished_at"]  # it does not wait for longer jobs
    difference = np.abs(pixels(stack.image(alone)) - pixels(stack.image(short)))
    assert difference.max() <= 1


def test_a_worker_that_stops_requeues_its_unfinished_jobs(stack):
    ids = submitted_together(stack, 40, 40)
    stack.wait_until_running(ids)
    with stack.sessions.begin() as session:
        running = session.scalars(select(Dispatch).where(Dispatch.status == "running")).one()
    psutil.Process(int(running.worker_id.split(":")[1])).terminate()
    jobs = stack.wait(ids)

    assert {(job["status"], job["attempt"]) for job in jobs} == {("succeeded", 1)}
    with stack.sessions.begin() as session:
        rows = session.scalars(select(Job).where(Job.id.in_(ids))).all()
        released = session.get(Dispatch, running.id)
    assert released.id not in {row.dispatch_id for row in rows}
    assert {row.requeue_count for row in rows} == {0}
    assert released.status == "released"  # by its own worker, long before its lease ran out


def test_jobs_of_a_killed_worker_run_again_after_its_lease(stack):
    ids = [stack.submit(num_inference_steps=50, width=256, height=256) for _ in range(2)]
    stack.wait_until_running(ids)
    for worker in stack.find("-m workers run"):
        if "serve" not in " ".join(worker.cmdline()):
            worker.kill()
    began = time.monotonic()
    jobs = stack.wait(ids)

    assert statuses(jobs) == ["succeeded"] * 2
    assert max(job["attempt"] for job in jobs) == 2
    assert time.monotonic() - began > 1


def test_a_flushed_redis_loses_nothing(stack):
    ids = [stack.submit(seed=seed) for seed in range(30)]
    url = (stack.data_dir / "secrets" / "darkroom_redis_url").read_text()

    def finished():
        with stack.sessions.begin() as session:
            done = select(func.count()).where(Job.id.in_(ids), Job.finished_at.is_not(None))
            return session.scalar(done)

    with Redis.from_url(url) as client:
        for count in (0, 4, 8, 12, 16):  # five times, while there is work
            stack.until(lambda count=count: finished() >= count)
            client.flushall()

    assert statuses(stack.wait(ids)) == ["succeeded"] * 30


@pytest.mark.slow
def test_a_worker_that_slept_past_its_lease_is_refused(stack):
    ids = [stack.submit(num_inference_steps=20, width=256, height=256) for _ in range(3)]
    stack.wait_until_running(ids)
    with stack.sessions.begin() as session:
        running = session.execute(
            select(Dispatch.id, Dispatch.worker_id).where(Dispatch.status == "running")
        ).first()
    frozen = psutil.Process(int(running.worker_id.split(":")[1]))
    frozen.send_signal(signal.SIGSTOP)
    try:
        jobs = stack.wait(ids)
    finally:
        frozen.send_signal(signal.SIGCONT)
    assert statuses(jobs) == ["succeeded"] * 3

    before = [(job["image"]["sha256"], job["attempt"]) for job in jobs]
    refused = f"dispatch {running.id} lost its lease"
    stack.until(lambda: refused in stack.log("worker-1") + stack.log("worker-2"), within_s=30)
    after = [stack.job(job_id) for job_id in ids]
    assert [(job["image"]["sha256"], job["attempt"]) for job in after] == before
    with stack.sessions.begin() as session:
        events = session.execute(
            select(Event.job_id, Event.type)
            .where(Event.job_id.in_(ids), Event.type != "job.started")
            .order_by(Event.id)
        ).all()
    assert sorted(map(tuple, events)) == sorted((job_id, "job.succeeded") for job_id in ids)


@pytest.mark.slow
def test_without_storage_jobs_wait_and_finish_when_it_is_back(stack):
    [store] = stack.find("rclone", "serve")
    store.send_signal(signal.SIGSTOP)
    try:
        refusals = storage_refusals(stack)
        ids = [stack.submit(seed=seed) for seed in range(4)]
        stack.until(lambda: storage_refusals(stack) > refusals)
        assert not {"succeeded", "failed"} & set(statuses(map(stack.job, ids)))
    finally:
        store.kill()  # the launcher starts it again, on the same port

    assert statuses(stack.wait(ids)) == ["succeeded"] * 4


def storage_refusals(stack):
    """Count how often a worker found the store unavailable, before a claim or for an image."""
    logs = stack.log("worker-1") + stack.log("worker-2")
    return logs.count("StorageUnavailable") + logs.count("could not store the image")


@pytest.mark.slow
def test_a_database_that_restarts_during_generation_costs_no_job(stack):
    ids = [stack.submit(num_inference_steps=10, width=256, height=256) for _ in range(3)]
    stack.wait_until_running(ids)
    for process in stack.find("postgres"):
        with contextlib.suppress(psutil.NoSuchProcess):  # the first that dies takes others along
            process.kill()
    stack.until(lambda: stack.http.get("/readyz").status_code == 200, within_s=30)

    assert statuses(stack.wait(ids)) == ["succeeded"] * 3


@pytest.mark.slow
def test_with_redis_frozen_and_then_empty_queued_jobs_finish_by_themselves(stack):
    [redis] = stack.find("redis-server") + stack.find("valkey-server")
    redis.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        ids = [stack.submit(seed=seed) for seed in range(5)]
        assert time.monotonic() - began < 5
    finally:
        redis.kill()

    assert statuses(stack.wait(ids)) == ["succeeded"] * 5


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["triton_python_backend_stub", "tritonserver"])
def test_jobs_outlive_the_death_of_their_model(stack, victim):
    ids = [stack.submit(num_inference_steps=40, width=256, height=256) for _ in range(2)]
    stack.wait_until_generating(ids)
    for process in stack.find(victim):
        process.kill()

    assert statuses(stack.wait(ids)) == ["succeeded"] * 2


@pytest.mark.slow
def test_a_prompt_that_kills_the_model_fails_alone(stack):
    # three microbatches: one or two of them run when the poison does
    lines = [f"{POISON if seed == 5 else 'a dog'},{seed},4,64,64" for seed in range(24)]
    batch = stack.http.post(
        "/v1/batches",
        content="\n".join(["prompt,seed,steps,width,height", *lines]),
        headers={"Content-Type": "text/csv"},
    ).json()
    ids = [job["id"] for job in stack.http.get(batch["urls"]["jobs"]).json()["data"]]
    jobs = stack.wait(ids, within_s=400)

    poison = jobs.pop(5)
    assert (poison["status"], poison["attempt"]) == ("failed", 3)
    assert poison["error"]["code"] == "worker_crashed"
    assert statuses(jobs) == ["succeeded"] * 23
    ended = stack.http.get(f"/v1/batches/{batch['id']}").json()
    assert (ended["status"], ended["outcome"]) == ("completed", "partial")


@pytest.mark.slow
def test_jobs_outlive_their_replica(stack):
    ids = [stack.submit(num_inference_steps=40, width=256, height=256) for _ in range(2)]
    stack.wait_until_running(ids)
    for process in stack.find("ray::ServeReplica"):
        process.kill()

    assert statuses(stack.wait(ids)) == ["succeeded"] * 2


@pytest.mark.chaos
def test_replicas_follow_the_work_from_none_to_the_most_and_back(stack):
    steps = ["0:0", "3:1", "50:2", "4:1", "0:0"]
    [deployer] = stack.find("-m workers serve")
    environment = deployer.environ()
    driver = subprocess.run(
        [
            *(sys.executable, HOME / "tests" / "support" / "replica_counts.py"),
            *(environment["DARKROOM_RAY_ADDRESS"], *steps),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert driver.returncode == 0, driver.stderr[-3000:]
    assert driver.stdout.split() == steps


@pytest.mark.chaos
@pytest.mark.timeout(480)  # three engines start, one of them in vain, which Ray tries three times
def test_an_engine_is_replaced_only_if_it_generates_the_same_images(stack, tmp_path, registry):
    golden = tmp_path / "golden.jsonl"
    golden.write_text(json.dumps({"prompt": "a red apple", "seed": 1} | SMALL) + "\n")
    model = registry.models["darkroom-demo"].folder
    before = stack.image(stack.wait([stack.submit(seed=5)])[0]["id"])

    refused = replaced(stack, registry.models["darkroom-demo-v1"].folder, golden)
    assert refused.returncode == 1, refused.stderr
    assert "DIFFERS" in refused.stdout
    assert not stack.find("ServeReplica", "~green")

    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    assert replaced(stack, broken, golden).returncode == 1

    meanwhile = [stack.submit(seed=seed) for seed in range(100, 120)]
    accepted = replaced(stack, model, golden)
    assert accepted.returncode == 0, accepted.stderr
    assert "agrees" in accepted.stdout
    assert stack.find("ServeReplica", "~green")
    after = stack.submit(seed=5)
    assert statuses(stack.wait([*meanwhile, after])) == ["succeeded"] * 21
    difference = np.abs(pixels(stack.image(after)) - pixels(before))
    assert difference.max() <= 1


def replaced(stack, folder, golden):
    """Run `python -m workers replace` in the environment of the deploying process."""
    [deployer] = stack.find("-m workers serve")
    return subprocess.run(
        [
            *(sys.executable, "-m", "workers", "replace", "darkroom-demo"),
            *("--folder", folder, "--golden", golden),
        ],
        env=deployer.environ(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
