"""A row becomes jobs, or a list of everything that is wrong with it."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.errors import InvalidInput
from darkroom.generation.params import MAX_SEED
from darkroom.imports import columns
from darkroom.imports.records import Record
from darkroom.imports.row_validator import ImportOptions, RowValidator
from darkroom.status import PRIORITY_RANK, Priority
from tests.support.hostile_urls import BLOCKED_AS_TEXT
from tests.support.import_rows import POLICY, JobColumns, problems, read_jobs


def test_columns_have_short_names_too(registry):
    [row] = read_jobs(registry, "prompt,steps,cfg,negative\na cat,5,2.5,a dog\n")

    assert row.num_inference_steps == 5
    assert row.guidance_scale == 2.5
    assert row.negative_prompt == "a dog"


def test_an_empty_cell_is_the_models_default(registry):
    [row] = read_jobs(registry, "prompt,steps,seed\na cat,,\n")

    assert row.num_inference_steps == 8
    assert 0 <= row.seed <= MAX_SEED


def test_a_row_may_become_several_images_whose_seeds_count_up(registry):
    jobs = read_jobs(registry, "prompt,seed,num_images\na cat,7,3\na dog,1,1\n")

    assert [(r.row_number, r.image_number, r.seed) for r in jobs] == [
        (1, 0, 7),
        (1, 1, 8),
        (1, 2, 9),
        (2, 0, 1),
    ]


def test_a_column_of_hostile_urls_is_refused_row_by_row(registry):
    urls = [url for url in BLOCKED_AS_TEXT if url.strip() and "\ud800" not in url]
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["prompt", "webhook_url"], *(["a", url] for url in urls)])
    found = problems(registry, file.getvalue())

    assert [loc[1] for loc, _ in found] == list(range(1, len(urls) + 1))
    assert {loc[2] for loc, _ in found} == {"webhook_url"}


def test_every_bad_row_is_reported_not_only_the_first(registry):
    text = "prompt,steps\n,5\na cat,0\na dog,5\na cow,99\n"
    assert [loc[1] for loc, _ in problems(registry, text)] == [1, 2, 4]


def test_the_query_sets_defaults_of_all_rows(registry):
    defaults = [("steps", "5"), ("seed", "7"), ("priority", "normal"), ("num_images", "2")]
    jobs = read_jobs(registry, "prompt,seed\na cat,\na dog,1\n", defaults=defaults)

    assert [row.seed for row in jobs] == [7, 8, 1, 2]
    assert {row.num_inference_steps for row in jobs} == {5}
    assert {row.priority for row in jobs} == {PRIORITY_RANK[Priority.NORMAL]}


@pytest.mark.parametrize(
    ("defaults", "code"),
    [
        ([("steps", "x")], "not_a_number"),
        ([("steps", "1"), ("num_inference_steps", "1")], "duplicate_parameter"),
        ([("stepz", "1")], "unknown_parameter"),
        ([("prompt", "a")], "unknown_parameter"),
        ([("seed", "-1")], "greater_than_equal"),
    ],
)
def test_a_bad_default_is_named(registry, defaults, code):
    [(loc, found)] = problems(registry, "prompt\na\n", defaults=defaults)
    assert (loc[0], found) == ("query", code)


per_row = st.fixed_dictionaries(
    {"prompt": st.sampled_from(["a cat", "a dog", "a cow", "\0", 7])},
    optional={
        "seed": st.sampled_from([1, 1.0, True, -1, MAX_SEED, None, "1"]),
        "negative_prompt": st.sampled_from(["", "blurry", "\x1b", None]),
        "custom_id": st.sampled_from(["x", "y", "", 7]),
    },
)
shared = st.sampled_from(
    [
        *({"steps": steps} for steps in (1, 1.0, True, 0)),
        *({"num_images": images} for images in (1, 2, 1.0, True)),
        *({"guidance_scale": scale} for scale in (1, 1.0, True)),
        *({"metadata": metadata} for metadata in ({}, {"k": "v"}, {"k": 1}, [])),
        *({"label": label} for label in ("x", "")),
    ]
)
values = st.builds(lambda *parts: parts[0] | parts[1], per_row, shared)


@given(st.lists(values, min_size=2, max_size=12))
def test_the_fields_that_rows_share_do_not_change_how_each_is_validated(registry, rows_given):
    """Later rows use the templates of earlier ones; a row alone is validated in full."""

    def outcome(validate, number, fields):
        fields = {columns.canonical(name): value for name, value in fields.items()}
        try:
            jobs = validate(Record(number, fields, []))
        except InvalidInput as invalid:
            return invalid.problems
        rows = [JobColumns(job) for job in jobs]
        for row in rows:
            row.seed = row.seed if fields.get("seed") is not None else "random"
            row.template = None
        return [vars(row) for row in rows]

    options = ImportOptions(registry, POLICY)
    together, seen = RowValidator(options), set()
    for number, fields in enumerate(rows_given, start=1):
        duplicate = fields.get("custom_id") in seen
        seen |= {fields["custom_id"]} if "custom_id" in fields else set()
        found = outcome(together, number, fields)
        if duplicate and isinstance(fields["custom_id"], str):
            assert [problem.code for problem in found] == ["not_unique"]
        else:
            assert found == outcome(RowValidator(options), number, fields)
