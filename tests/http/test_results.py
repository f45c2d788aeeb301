"""Results of a batch as files."""

import csv
import hashlib
import io

import httpx2
import pytest

from darkroom.generation import file_names
from darkroom.status import OutputFormat
from tests.support.api_server import assert_problem
from tests.support.batch_results import archive_of, manifest_of


def test_the_manifest_lists_every_job_in_the_order_of_its_rows(http, submit, worker, registry):
    batch = submit()
    assert [line["status"] for line in manifest_of(http, batch)] == ["queued"] * 4
    worker.run()
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


def test_the_manifest_as_a_table_runs_no_formula(http, submit, worker):
    batch = submit()
    worker.run()
    response = http.get(f"/v1/batches/{batch['id']}/manifest.csv")
    rows = list(csv.DictReader(io.StringIO(response.text, newline="")))

    assert [row["prompt"] for row in rows] == ["a cat", "a cat", "../=evil", "'=1+1"]
    assert [row["sha256"] for row in rows] == [line["sha256"] for line in manifest_of(http, batch)]
    assert rows[0]["custom_id"] == "x"


def test_manifest_and_archive_are_valid_while_the_batch_runs(http, submit, worker):
    batch = submit("prompt,seed\n" + "".join(f"a {n},{n}\n" for n in range(30)))
    worker.run(2)
    lines = manifest_of(http, batch)
    with archive_of(http, batch) as archive:
        assert archive.testzip() is None
        succeeded = [line for line in lines if line["status"] == "succeeded"]
        assert archive.namelist() == [line["file"] for line in succeeded]
        for line in succeeded:
            assert hashlib.sha256(archive.read(line["file"])).hexdigest() == line["sha256"]
    assert len(succeeded) == 16
    assert [line["url"] for line in lines if line["status"] == "queued"] == [None] * 14
    assert http.get(batch["urls"]["manifest"]).headers["cache-control"] == "no-store"


def test_an_archive_of_nothing_is_an_archive(http, submit):
    with archive_of(http, submit()) as archive:
        assert archive.namelist() == []


def test_a_lost_or_altered_image_is_reported_and_left_out(http, submit, worker):
    batch = submit()
    worker.run()
    lines = manifest_of(http, batch)
    worker.store.delete(lines[0]["key"])
    worker.store.put(lines[2]["key"], b"another", "image/png")

    with archive_of(http, batch) as archive:
        assert archive.namelist() == [lines[1]["file"], lines[3]["file"], "missing.txt"]
        report = archive.read("missing.txt").decode()
    assert lines[0]["id"] in report
    assert lines[2]["id"] in report


def test_without_storage_the_archive_is_a_problem_and_not_half_a_file(
    http, submit, worker, s3_server
):
    batch = submit()
    worker.run()
    s3_server.kill()
    assert_problem(http.get(batch["urls"]["images"]), 503, "storage_unavailable")


@pytest.mark.parametrize("name", ["manifest.jsonl", "manifest.csv", "images.zip", "errors.csv"])
def test_an_unknown_batch_has_no_results(http, name):
    assert_problem(http.get(f"/v1/batches/bat_{'0' * 32}/{name}"), 404, "not_found")


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "%s%n", "猫", "a/b\\c", "x" * 500, "- "])
def test_file_names_are_safe_on_every_file_system(prompt):
    name = file_names.in_batch(prompt, 7, OutputFormat.PNG, row_number=3, image_number=0)

    assert name.startswith("0003-")
    assert name.endswith("-7.png")
    assert len(name) < 80
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")
