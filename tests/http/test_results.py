"""What a batch has become: files of results, its verbs, and the end of what is kept."""

import csv
import hashlib
import io
import json
import threading
import uuid
import zipfile
from contextlib import contextmanager
from datetime import timedelta

import httpx2
import psycopg
import pytest
from PIL import Image
from sqlalchemy import func, select, update
from typer.testing import CliRunner

from darkroom.cli import app
from darkroom.db.connection import migrate, open_sessions
from darkroom.db.tables import Batch, Event, Job, RejectedRowChunk, Tenant
from darkroom.generation import file_names
from darkroom.status import OutputFormat
from tests.support.api_server import CSV, assert_problem, serve, stop
from tests.support.fake_worker import Painter, store_of
from workers.maintenance.cleaner import Cleaner

TEXT = "prompt,seed,num_images,custom_id\na cat,7,2,x\n../=evil,1,,\n=1+1,2,,\n"


@pytest.fixture(scope="module")
def environment(_postgres, api_environment):
    """As of the shared API, but with a database in which only this module's jobs wait."""
    name = f"results_{uuid.uuid4().hex}"
    with psycopg.connect(_postgres.url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
    url = f"{_postgres.url.rpartition('/')[0]}/{name}"
    migrate(url)
    return api_environment | {"DARKROOM_DATABASE_URL": url}


@pytest.fixture(scope="module")
def url(environment, tmp_path_factory):
    process, url = serve(environment, tmp_path_factory.mktemp("results") / "log")
    yield url
    stop(process)


@pytest.fixture
def http(url):
    with httpx2.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def painter(environment):
    sessions = open_sessions(environment["DARKROOM_DATABASE_URL"])
    yield Painter(sessions, store_of(environment))
    sessions.kw["bind"].dispose()


@pytest.fixture
def submit(http, painter):
    """A batch of a file's rows; what earlier tests left waiting is out of the way."""
    painter.paint()

    def send(text=TEXT, **params):
        response = http.post("/v1/batches", content=text, headers=CSV, params=params)
        assert response.status_code == 202, response.text
        return response.json()

    return send


@pytest.fixture
def darkroom(url):
    """Runs the command in this process; test_cli.py runs it as one of its own."""

    def run(*words):
        environment = {"DARKROOM_API": url, "NO_COLOR": "1", "COLUMNS": "100"}
        return CliRunner().invoke(app, list(map(str, words)), env=environment)

    return run


def manifest_of(http, batch):
    text = http.get(batch["urls"]["manifest"]).text
    return [json.loads(line) for line in text.splitlines()]


def archive_of(http, batch):
    return zipfile.ZipFile(io.BytesIO(http.get(batch["urls"]["images"]).content))


def test_the_manifest_tells_of_every_job_in_the_order_of_its_rows(http, submit, painter, registry):
    batch = submit()
    assert [line["status"] for line in manifest_of(http, batch)] == ["queued"] * 4
    painter.paint()
    lines = manifest_of(http, batch)

    assert [(line["row_number"], line["image_number"]) for line in lines] == [
        (1, 0), (1, 1), (2, 0), (3, 0)
    ]  # fmt: skip
    assert [line["file"] for line in lines] == [
        "0001-a-cat-7.png", "0001.1-a-cat-8.png", "0002-evil-1.png", "0003-1-1-2.png"
    ]  # fmt: skip
    assert [line["seed"] for line in lines] == [7, 8, 1, 2]
    assert lines[0]["parameters"]["prompt"] == "a cat"
    assert {line["revision"] for line in lines} == {registry.models["darkroom-demo"].revision}
    for line in lines:
        image = httpx2.get(line["url"]).content
        assert hashlib.sha256(image).hexdigest() == line["sha256"]
        assert len(image) == line["bytes"]


def test_the_manifest_as_a_table_runs_no_formula(http, submit, painter):
    batch = submit()
    painter.paint()
    response = http.get(f"/v1/batches/{batch['id']}/manifest.csv")
    rows = list(csv.DictReader(io.StringIO(response.text, newline="")))

    assert [row["prompt"] for row in rows] == ["a cat", "a cat", "../=evil", "'=1+1"]
    assert [row["sha256"] for row in rows] == [line["sha256"] for line in manifest_of(http, batch)]
    assert rows[0]["custom_id"] == "x"


def test_both_are_valid_in_the_middle_and_urls_are_new_at_each_read(http, submit, painter):
    batch = submit("prompt,seed\n" + "".join(f"a {n},{n}\n" for n in range(30)))
    painter.paint(2)
    lines = manifest_of(http, batch)
    with archive_of(http, batch) as archive:
        assert archive.testzip() is None
        drawn = [line for line in lines if line["status"] == "succeeded"]
        assert archive.namelist() == [line["file"] for line in drawn]
        for line in drawn:
            assert hashlib.sha256(archive.read(line["file"])).hexdigest() == line["sha256"]
    assert len(drawn) == 16
    assert [line["url"] for line in lines if line["status"] == "queued"] == [None] * 14
    assert http.get(batch["urls"]["manifest"]).headers["cache-control"] == "no-store"


def test_an_archive_of_nothing_is_an_archive(http, submit):
    with archive_of(http, submit()) as archive:
        assert archive.namelist() == []


def test_a_lost_or_altered_picture_is_told_of_and_never_passed_on(http, submit, painter):
    batch = submit()
    painter.paint()
    lines = manifest_of(http, batch)
    painter.store.delete(lines[0]["key"])
    painter.store.put(lines[2]["key"], b"another", "image/png")

    with archive_of(http, batch) as archive:
        assert archive.namelist() == [lines[1]["file"], lines[3]["file"], "missing.txt"]
        told = archive.read("missing.txt").decode()
    assert lines[0]["id"] in told
    assert lines[2]["id"] in told


def test_without_a_store_the_archive_is_a_problem_and_not_half_a_file(
    http, submit, painter, s3_server
):
    batch = submit()
    painter.paint()
    s3_server.kill()
    assert_problem(http.get(batch["urls"]["images"]), 503, "storage_unavailable")


@pytest.mark.parametrize("name", ["manifest.jsonl", "manifest.csv", "images.zip", "errors.csv"])
def test_there_are_no_results_of_a_batch_that_is_not_ours(http, name):
    assert_problem(http.get(f"/v1/batches/bat_{'0' * 32}/{name}"), 404, "not_found")


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "%s%n", "猫", "a/b\\c", "x" * 500, "- "])
def test_file_names_hold_nothing_that_a_file_system_minds(prompt):
    name = file_names.in_batch(prompt, 7, OutputFormat.PNG, row_number=3, image_number=0)

    assert name.startswith("0003-")
    assert name.endswith("-7.png")
    assert len(name) < 80
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")


@pytest.fixture
def polls(http):
    """Polls a batch until the block ends; every answer's status, after its counts were summed."""

    @contextmanager
    def of(path):
        seen, wrong, stopped = [], [], threading.Event()

        def poll():
            with httpx2.Client(base_url=http.base_url, timeout=60) as client:
                while not stopped.is_set():
                    found = client.get(path).json()
                    counts = dict(found["counts"])
                    total = counts.pop("total")
                    counts.pop("rejected")
                    seen.append(found["status"])
                    wrong.extend([found] * (sum(counts.values()) != total))

        thread = threading.Thread(target=poll)
        thread.start()
        try:
            yield seen
        finally:
            stopped.set()
            thread.join()
        assert wrong == []

    return of


def test_counts_sum_at_every_poll_through_pauses_cancel_and_retry(http, submit, painter, polls):
    rows = "".join(f"{'poison' if n % 10 == 0 else 'a cat'},{n}\n" for n in range(1, 201))
    batch = submit("prompt,seed\n" + rows)
    path = batch["urls"]["self"]

    def verb(name):
        response = http.post(f"{path}/{name}")
        assert response.status_code in {200, 202}, response.text
        return response.json()

    with polls(path) as seen:
        for done in range(0, 80, 16):
            taken = painter.claim()
            paused = verb("pause")
            assert (paused["status"], paused["counts"]["running"]) == ("paused", 8)
            painter.settle(taken)
            assert painter.claim() == []
            assert http.get(path).json()["counts"]["queued"] == 200 - done - 8
            assert verb("resume")["status"] == "running"
            painter.paint(1)
        taken = painter.claim()
        canceled = verb("cancel")
        assert (canceled["status"], canceled["counts"]["canceled"]) == ("canceled", 112)
        painter.settle(taken)
        ended = verb("cancel")
        failed = ended["counts"]["failed"]
        again = verb("retry")

    assert {"paused", "running"} <= set(seen)
    assert ended["counts"] == ended["counts"] | {"queued": 0, "running": 0, "canceled": 120}
    assert (failed, ended["counts"]["succeeded"]) == (8, 72)
    assert (again["counts"]["total"], again["retried_from"]) == (failed, batch["id"])
    assert verb("retry")["id"] == again["id"]
    with painter.sessions.begin() as session:
        ends = session.scalars(
            select(Event.type).where(Event.batch_id == batch["id"], Event.job_id.is_(None))
        ).all()
    assert ends == ["batch.canceled"]


def test_a_batch_completes_once_and_its_failures_are_drawn_again(http, submit, painter):
    batch = submit("prompt\na cat\npoison\n")
    assert_problem(http.post(f"{batch['urls']['self']}/retry"), 409, "nothing_to_retry")
    painter.paint()
    ended = http.get(batch["urls"]["self"]).json()
    again = http.post(batch["urls"]["retry"])

    assert (ended["status"], ended["outcome"]) == ("completed", "partial")
    assert again.status_code == 202
    [job] = http.get(again.json()["urls"]["jobs"]).json()["data"]
    assert (job["row_number"], job["input"]["prompt"]) == (2, "poison")
    with painter.sessions.begin() as session:
        events = select(func.count()).where(
            Event.batch_id == batch["id"], Event.type == "batch.completed"
        )
        assert session.scalar(events) == 1


def test_batches_are_listed_by_label_and_status(http, submit, painter):
    label = uuid.uuid4().hex
    done, canceled, paused = (submit(label=label) for _ in range(3))
    for batch, verb in ((canceled, "cancel"), (paused, "pause")):
        http.post(f"{batch['urls']['self']}/{verb}")
    painter.paint()
    queued, running = (submit(label=label) for _ in range(2))
    http.post(f"{queued['urls']['self']}/pause")
    taken = painter.claim()
    http.post(f"{queued['urls']['self']}/resume")

    def listed(**params):
        found = http.get("/v1/batches", params={"label": label} | params).json()["data"]
        assert all(batch["status"] == params.get("status", batch["status"]) for batch in found)
        return [batch["id"] for batch in found]

    made = [done, canceled, paused, queued, running]
    assert listed() == [batch["id"] for batch in made[::-1]]
    for batch, status in zip(
        made, ["completed", "canceled", "paused", "queued", "running"], strict=True
    ):
        assert listed(status=status) == [batch["id"]]
    assert_problem(http.get("/v1/batches?status=drawn"), 422)
    painter.settle(taken)


def test_the_command_line_goes_the_whole_way(darkroom, painter, tmp_path):
    painter.paint()
    stopped = threading.Event()
    working = threading.Thread(target=painter.paint_until, args=(stopped,))
    working.start()
    try:
        file = tmp_path / "prompts.csv"
        file.write_text("prompt,seed\na cat,1\n,2\npoison,3\n")
        done = darkroom("batch", "submit", file, "--on-error", "skip", "--wait")
    finally:
        stopped.set()
        working.join()
    batch = json.loads(done.stdout)
    assert done.exit_code == 1, done.stderr
    assert (batch["outcome"], batch["counts"]["rejected"]) == ("partial", 1)
    assert "1 rows were skipped" in done.stderr
    assert darkroom("batch", "errors", batch["id"], "--out", tmp_path / "e.csv").exit_code == 0
    assert "is required" in (tmp_path / "e.csv").read_text()
    again = json.loads(darkroom("batch", "retry", batch["id"]).stdout)
    assert again["counts"]["total"] == 1
    for verb, status in (("pause", "paused"), ("resume", "queued"), ("cancel", "canceled")):
        changed = darkroom("batch", verb, again["id"])
        assert json.loads(changed.stdout)["status"] == status, changed.stderr
    assert darkroom("batch", "watch", again["id"]).exit_code == 1


def test_a_download_goes_on_where_it_ended(submit, painter, darkroom, tmp_path):
    painter = Painter(painter.sessions, painter.store, real_png)
    batch = submit("prompt,seed\na cat,1\na dog,2\na cow,3\n" + "a pig,4\n" * 8)
    painter.paint(1)
    first = darkroom("batch", "download", batch["id"], "--out", tmp_path)
    assert first.exit_code == 0, first.stderr
    assert "8 images" in first.stderr
    assert "3 jobs without an image" in " ".join(first.stderr.split())  # wrapped
    (tmp_path / "0001-a-cat-1.png").write_bytes(b"damaged")
    kept = tmp_path / "0002-a-dog-2.png"
    stamp = kept.stat().st_mtime_ns
    painter.paint()

    second = darkroom("batch", "download", batch["id"], "--out", tmp_path)
    assert "11 images" in second.stderr
    assert "(7 already there)" in " ".join(second.stderr.split())
    assert kept.stat().st_mtime_ns == stamp
    for line in map(json.loads, (tmp_path / "manifest.jsonl").read_text().splitlines()):
        image = (tmp_path / line["file"]).read_bytes()
        assert hashlib.sha256(image).hexdigest() == line["sha256"]
    assert (tmp_path / "contact-sheet.png").stat().st_size > 1000
    assert not list(tmp_path.glob("*.part"))


def real_png(job):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (job.seed % 256, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_dry_run_shows_a_table_and_a_sweep_its_size(darkroom, tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,steps\na cat,0\na {red|green} dog,4|8\n")
    dry = darkroom("batch", "submit", file, "--dry-run", "--expand", "product")
    assert dry.exit_code == 2, dry.stderr
    assert "out_of_range" in dry.stderr
    assert json.loads(dry.stdout)["counts"]["total"] == 4
    made = darkroom("batch", "sweep", "a {red|green} dog", "--set", "steps=4|8", "--set", "seed=1")
    assert made.exit_code == 0, made.stderr
    assert "1 rows make 4 jobs" in made.stderr
    assert json.loads(made.stdout)["counts"]["total"] == 4
    assert darkroom("batch", "submit", file, "--set", "steps").exit_code == 2


@pytest.fixture
def janitor(painter):
    def clean(**options):
        options = {"retention_days": None, "orphan_age": timedelta(hours=24)} | options
        worker = Cleaner(painter.sessions, painter.store, **options)
        pages = 1 + 1000 // 500
        for _ in range(pages):
            worker.clean()

    return clean


def aged(painter, days, **subject):
    """Let what has ended have ended so many days ago."""
    back = {"finished_at": func.now() - timedelta(days=days)}
    with painter.sessions.begin() as session:
        session.execute(update(Batch).where(Batch.id == subject.get("batch")).values(back))
        session.execute(
            update(Job)
            .where((Job.batch_id == subject.get("batch")) | (Job.id == subject.get("job")))
            .values(back)
        )


def test_what_was_kept_long_enough_leaves_tombstones(http, submit, painter, janitor):
    batch = submit("prompt\na cat\n\0\n", on_error="skip", retention_days=3, label="secret")
    other = submit("prompt\na dog\n")
    painter.paint()
    [line], [kept] = manifest_of(http, batch), manifest_of(http, other)
    aged(painter, 2.9, batch=batch["id"])
    aged(painter, 1000, batch=other["id"])
    janitor()
    assert http.get(f"/v1/jobs/{line['id']}").status_code == 200
    aged(painter, 3.1, batch=batch["id"])
    janitor()

    assert_problem(http.get(f"/v1/jobs/{line['id']}"), 410)
    assert httpx2.get(line["url"]).status_code == 404
    found = http.get(batch["urls"]["self"]).json()
    assert found["deleted_at"]
    assert (found["label"], found["counts"]["succeeded"]) == (None, 1)
    assert "a cat" not in http.get(batch["urls"]["manifest"]).text
    assert archive_of(http, batch).namelist() == []
    with painter.sessions.begin() as session:
        assert not session.scalars(
            select(RejectedRowChunk.piece).where(RejectedRowChunk.batch_id == batch["id"])
        ).all()
    assert httpx2.get(kept["url"]).status_code == 200


def test_a_tenants_days_hold_where_a_batch_says_nothing(http, submit, painter, janitor):
    long, short = submit("prompt\na\n", retention_days=9), submit("prompt\na\n")
    single = http.post("/v1/jobs", json={"prompt": "alone"}).json()
    painter.paint()
    for days, janitors_days, gone in ((5, None, False), (5, 6, False), (5, 4, True)):
        for batch in (long, short):
            aged(painter, days, batch=batch["id"])
        aged(painter, days, job=single["id"])
        janitor(retention_days=janitors_days)
        assert bool(http.get(short["urls"]["self"]).json()["deleted_at"]) is gone
        assert (http.get(f"/v1/jobs/{single['id']}").status_code == 410) is gone
        assert not http.get(long["urls"]["self"]).json()["deleted_at"]

    later = submit("prompt\na\n")
    painter.paint()
    aged(painter, 5, batch=later["id"])
    set_days(painter, 2)
    try:
        janitor(retention_days=100)
    finally:
        set_days(painter, None)
    assert http.get(later["urls"]["self"]).json()["deleted_at"]


def set_days(painter, days):
    with painter.sessions.begin() as session:
        session.execute(update(Tenant).values(retention_days=days))


def test_only_old_objects_that_no_job_knows_are_removed(http, submit, painter, janitor):
    batch = submit("prompt\na\nb\n")
    painter.paint()
    known = [line["key"] for line in manifest_of(http, batch)]
    running = submit("prompt\nc\n")
    [taken] = painter.claim()
    under_way = f"{taken.tenant_id}/{taken.id}/{taken.dispatch_id}.png"
    lost = known[0].replace(".png", ".jpg").rpartition("/")[0] + "/1.png"
    strangers = f"ten_default/job_{'0' * 32}/7.png"
    foreign = "backup/of/mine.png"
    for key in (under_way, lost, strangers, foreign):
        painter.store.put(key, b"x", "image/png")

    janitor()
    assert stored(painter, under_way, lost, strangers, foreign, *known) == [True] * 6
    janitor(orphan_age=timedelta(0))
    assert stored(painter, lost, strangers) == [False] * 2
    assert stored(painter, under_way, foreign, *known) == [True] * 4
    painter.settle([taken])
    assert manifest_of(http, running)[0]["status"] == "succeeded"
    painter.store.delete(foreign)


def stored(painter, *keys):
    there, after = set(), ""
    while page := painter.store.page(after=after, limit=500):
        there |= {each.key for each in page}
        after = page[-1].key
    return [key in there for key in keys]
