"""Bad rows of a file: how they are reported, returned, and sent again."""

import csv
import io

from tests.support.api_server import assert_problem
from tests.support.uploads import NDJSON, read_csv, send, table


def test_every_bad_row_is_reported_and_one_is_enough_to_create_nothing(http, made):
    before = made()
    bad = set(range(7, 6000, 3))
    found = assert_problem(send(http, table(6000, bad)), 422, "invalid_input")

    assert [error["loc"][1] for error in found["errors"]] == sorted(bad)
    assert found["error_count"] == len(bad)
    assert made() == before


def test_of_very_many_bad_rows_the_first_are_reported_and_all_are_counted(http):
    found = assert_problem(send(http, table(12_000, range(12_001))), 422)

    assert (len(found["errors"]), found["error_count"]) == (10_000, 12_000)
    assert "11,999 more" in found["detail"]


def test_rejected_rows_can_be_corrected_and_sent_again(http):
    header, rows = "prompt;cfg;negative", ["=SUM(1);4;", '\'-x;99;"a\nb"', "-;x;", "a;1;", "\0;1;c"]
    text = "\n".join([header, *rows, "too;4;many;cells", "few", ""])
    batch = send(http, text, on_error="skip").json()

    assert (batch["counts"]["total"], batch["counts"]["rejected"]) == (2, 5)
    response = http.get(batch["urls"]["errors"])
    assert response.headers["content-type"].startswith("text/csv")
    found = read_csv(response.text)
    assert [row["row_number"] for row in found] == ["2", "3", "5", "6", "7"]
    assert [row["error_column"] for row in found] == [
        "guidance_scale", "guidance_scale", "prompt", "", ""
    ]  # fmt: skip
    assert [row["prompt"] for row in found] == ["''-x", "'-", "'\0", "too", "few"]
    assert found[0]["negative"] == "a\nb"
    assert found[3]["negative"] == "many,cells"

    corrected = response.text.replace("99", "9").replace(",x,", ",1,").replace("\0", "zero")
    again = send(http, corrected, on_error="skip").json()
    assert (again["counts"]["total"], again["counts"]["rejected"]) == (5, 0)
    jobs = http.get(again["urls"]["jobs"]).json()["data"]
    assert [job["input"]["prompt"] for job in jobs[:2]] == ["'-x", "-"]


def test_of_many_rows_exactly_the_bad_ones_are_rejected_and_accepted_when_corrected(http):
    bad = set(range(50, 10_001, 100))
    batch = send(http, table(10_000, bad), on_error="skip").json()

    assert (batch["counts"]["queued"], batch["counts"]["rejected"]) == (9900, 100)
    text = http.get(batch["urls"]["errors"]).text
    found = read_csv(text)
    assert [int(row["row_number"]) for row in found] == sorted(bad)
    corrected = io.StringIO(newline="")
    writer = csv.DictWriter(corrected, list(found[0]))
    writer.writeheader()
    writer.writerows(row | {"steps": "4"} for row in found)
    again = send(http, corrected.getvalue()).json()
    assert (again["counts"]["queued"], again["counts"]["rejected"]) == (100, 0)


def test_bad_lines_of_json_are_returned_unchanged(http):
    text = '{"prompt": "a"}\n{"prompt": "b", "seed": -1}\n{oops\n'
    batch = send(http, text, NDJSON, on_error="skip").json()
    found = read_csv(http.get(batch["urls"]["errors"]).text)

    assert [row["record"] for row in found] == ['{"prompt": "b", "seed": -1}', "{oops"]
    assert [row["row_number"] for row in found] == ["2", "3"]


def test_a_batch_without_bad_rows_has_no_errors(http):
    batch = send(http, table(1), on_error="skip").json()
    response = http.get(batch["urls"]["errors"])

    assert (response.status_code, response.text) == (200, "")
    assert_problem(http.get("/v1/batches/bat_" + "0" * 32 + "/errors.csv"), 404)


def test_when_all_rows_are_bad_nothing_is_created_even_with_skip(http, made):
    before = made()
    found = assert_problem(send(http, table(3, {1, 2, 3}), on_error="skip"), 422)

    assert len(found["errors"]) == 3
    assert made() == before
