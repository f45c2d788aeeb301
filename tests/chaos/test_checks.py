"""A checker that cannot go red proves nothing: each invariant, fed what breaks it."""

from dataclasses import replace

import pytest

from tests.chaos.checks import violations
from tests.chaos.client import ExpectedImage, RecordedResponse, SentRequest
from tests.chaos.evidence import BatchRow, Evidence, JobRow, StoredImage
from tests.chaos.replica import color_of

WANTED = [ExpectedImage("a cat", 1), ExpectedImage("a dog", 2)]


def job(number, **changed):
    asked = WANTED[number - 1]
    row = JobRow(
        id=f"job_{number}",
        tenant_id="ten_a",
        status="succeeded",
        prompt=asked.prompt,
        seed=asked.seed,
        batch_id="bat_1",
        row_number=number,
        image_key=f"{number}.png",
        image_sha256=f"hash {number}",
        error_code=None,
        attempt=1,
        ends=1,
    )
    return replace(row, **changed)


def image(number, **changed):
    color = color_of(WANTED[number - 1].prompt, WANTED[number - 1].seed)
    return replace(StoredImage(f"hash {number}", f"job_{number}", color), **changed)


def batch(**changed):
    row = BatchRow("bat_1", 2, finished=True, ends=1, counts={"total": 2, "succeeded": 2})
    return {"bat_1": replace(row, **changed)}


GOOD = Evidence(
    submissions=[SentRequest(0, WANTED, as_batch=True, ids={"bat_1"})],
    answers=[
        RecordedResponse(202, None, "", 0.1),
        RecordedResponse(503, "5", "database_unavailable", 0.1),
    ],
    tenants=["ten_a", "ten_b"],
    jobs=[job(1), job(2)],
    batches=batch(),
    images={"1.png": image(1), "2.png": image(2)},
    trespasses=[("/v1/batches/bat_1", 404)],
)
HALF = batch(total=1, counts={"total": 1, "succeeded": 1})


def test_what_is_right_is_green():
    assert violations(GOOD) == []


@pytest.mark.parametrize(
    ("invariant", "changed"),
    [
        ("I1", {"jobs": [job(1)], "batches": HALF}),  # one row is missing, and nothing else says so
        ("I1", {"jobs": [job(1), job(2, status="running", ends=0)]}),
        ("I1", {"jobs": [job(1), job(2, status="failed", error_code="worker_crashed")]}),
        ("I1", {"jobs": [job(1), job(2, seed=3)]}),
        ("I1", {"jobs": [job(1), job(2, ends=0)]}),
        ("I2", {"jobs": [job(1), job(2), job(2)]}),  # one row is there twice
        ("I2", {"jobs": [job(1), job(2), job(2, id="job_3")]}),
        ("I2", {"jobs": [job(1), job(2, ends=2)]}),
        ("I2", {"batches": batch(ends=2)}),
        ("I3", {"images": {"1.png": image(1)}}),
        ("I3", {"images": {"1.png": image(1), "2.png": image(2, sha256="another")}}),
        ("I3", {"images": {"1.png": image(1), "2.png": image(2, job_id="job_1")}}),
        ("I3", {"images": {"1.png": image(1), "2.png": image(2, color=(0, 0, 0))}}),
        ("I4", {"deliveries": {"job_1": ["msg_1", "msg_1"]}}),
        ("I4", {"deliveries": {"job_1": ["msg_1"], "job_2": ["msg_2", "msg_3"]}}),
        ("I5", {"trespasses": [("/v1/batches/bat_1", 200)]}),
        ("I5", {"jobs": [job(1), job(2, tenant_id="ten_b")]}),
        ("I6", {"answers": [RecordedResponse(500, None, "internal_error", 0.1)]}),
        ("I6", {"answers": [RecordedResponse(503, None, "database_unavailable", 0.1)]}),
        ("I7", {"batches": batch(counts={"total": 2, "succeeded": 1, "failed": 1})}),
        ("I7", {"batches": batch(finished=False, ends=0)}),
        ("I8", {"leftovers": ["dispatch 7"]}),
        ("I9", {"submissions": [SentRequest(0, WANTED, as_batch=True)]}),
        ("I9", {"submissions": [SentRequest(0, WANTED, as_batch=True, ids={"bat_1", "bat_2"})]}),
        ("I9", {"jobs": [job(1), job(2), job(1, id="job_3", batch_id=None, row_number=None)]}),
    ],
)
def test_what_is_wrong_is_red(invariant, changed):
    found = violations(replace(GOOD, **changed))

    assert invariant in {violation.invariant for violation in found}
