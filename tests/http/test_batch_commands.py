"""The batch commands of the command line, against a real API."""

import hashlib
import io
import json
import threading

from PIL import Image

from tests.support.fake_worker import FakeWorker


def test_the_command_line_submits_watches_and_retries_a_batch(darkroom, worker, tmp_path):
    stopped = threading.Event()
    working = threading.Thread(target=worker.run_until, args=(stopped,))
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


def test_a_second_download_fetches_what_is_missing_or_damaged(submit, worker, darkroom, tmp_path):
    worker = FakeWorker(worker.sessions, worker.store, real_png)
    batch = submit("prompt,seed\na cat,1\na dog,2\na cow,3\n" + "a pig,4\n" * 8)
    worker.run(1)
    first = darkroom("batch", "download", batch["id"], "--out", tmp_path)
    assert first.exit_code == 0, first.stderr
    assert "8 images" in first.stderr
    assert "3 jobs without an image" in " ".join(first.stderr.split())  # wrapped
    (tmp_path / "0001-a-cat-1.png").write_bytes(b"damaged")
    kept = tmp_path / "0002-a-dog-2.png"
    stamp = kept.stat().st_mtime_ns
    worker.run()

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
