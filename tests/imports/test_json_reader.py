"""Rows as lines of JSON, or in one JSON array."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.generation.params import MAX_SEED
from darkroom.media_types import Format
from tests.support.import_rows import few, problems, prompts, read_jobs


def test_rows_may_come_as_lines_of_json(registry):
    text = (
        '\ufeff{"prompt": "a cat", "steps": 5, "num_images": 2, "seed": 1}\n\n{"prompt": "a\\ndog"}'
    )
    made = read_jobs(registry, text, Format.JSON_LINES)

    assert [(row.row_number, row.image_number) for row in made] == [(1, 0), (1, 1), (2, 0)]
    assert (made[0].num_inference_steps, made[2].prompt) == (5, "a\ndog")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{", ((), "malformed_json")),
        (b"7", ((), "not_an_object")),
        (b'{"prompt": "a", "prompt": "b"}', ((), "duplicate_field")),
        (b'{"prompt": "a", "steps": 1, "num_inference_steps": 2}', ((), "duplicate_field")),
        (b'{"prompt": "a", "color": "red"}', (("color",), "unknown_field")),
        (b'{"prompt": "a", "seed": "7"}', (("seed",), "int_type")),
        (b'{"prompt": "a", "metadata": {"k": "v", "k": "w"}}', ((), "duplicate_field")),
        (b'{"prompt": "nul \\u0000"}', (("prompt",), "control_character")),
        (b'{"prompt": "a", "seed": 99999999999999999999}', (("seed",), "less_than_equal")),
        (b'{"prompt": "a", "seed": -0.0}', (("seed",), "int_type")),
        (b'{"prompt": "a", "cfg": 1e400}', (("guidance_scale",), "finite_number")),
        (b'{"prompt": "a", "__proto__": 1}', (("__proto__",), "unknown_field")),
        (b"null", ((), "not_an_object")),
        (b'{"prompt": "a", "seed": true}', (("seed",), "int_type")),
        (b'{"prompt": "a", "cfg": NaN}', (("guidance_scale",), "finite_number")),
        (b'{"prompt": "a", "custom_id": 7}', (("custom_id",), "string_type")),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", ((), "malformed_json")),
        (b'{"prompt": "lone \\ud800"}', (("prompt",), "string_unicode")),
        (b"[" * 50_000, ((), "malformed_json")),
        (b'{"prompt": "' + b"a" * 2**17 + b'"}', ((), "row_too_long")),
        (b'{"prompt": "caf\xe9"}', ((), "not_utf8")),
    ],
)
def test_a_bad_line_of_json_rejects_only_its_row(registry, line, expected):
    text = b'{"prompt": "a"}\n' + line + b'\n{"prompt": "", "seed": 1}\n'
    where, code = expected

    found = problems(registry, text, Format.JSON_LINES)
    assert found == [(("row", 2, *where), code), (("row", 3, "prompt"), "blank")]


@given(
    st.lists(st.tuples(prompts, st.integers(0, MAX_SEED)), max_size=300),
    st.booleans(),
    st.booleans(),
)
@few
def test_any_array_of_json_is_read_unchanged(registry, made, ascii_only, wrapped):
    jobs = [{"prompt": prompt, "seed": seed} for prompt, seed in made]
    text = json.dumps(
        {"jobs": jobs} if wrapped else jobs,
        ensure_ascii=ascii_only,
        indent=None if len(made) % 2 else 2,
    )
    found = read_jobs(registry, text, Format.JSON)

    assert [(row.prompt, row.seed) for row in found] == made
    assert [row.row_number for row in found] == list(range(1, len(made) + 1))


@pytest.mark.parametrize(
    "text",
    [
        '{"jobs": [{"prompt": "a"}',
        '{"jobs": [{"prompt": "a"} {"prompt": "b"}]}',
        '{"jobs": {"prompt": "a"}}',
        '{"jobs": [], "label": "x"}',
        '{"label": "x", "jobs": []}',
        '{"jobs": [{"prompt": "a"}]} {}',
        '{"jobs": [1, 2, tru]}',
        '{"prompt": "a"}',
        "[" * 50_000,
        '"jobs"',
        "",
        '{"jobs": [{"prompt": "' + "a" * 2**18 + '"}]}',
        b'{"jobs": [{"prompt": "caf\xe9"}]}',
    ],
)
def test_a_file_that_is_not_an_array_of_jobs_is_refused(registry, text):
    [(loc, code)] = problems(registry, text, Format.JSON)
    assert code in {"malformed_json", "unknown_field", "not_utf8"}, loc


def test_each_bad_job_of_an_array_is_reported(registry):
    text = '{"jobs": [7, {"prompt": "a", "seed": 1, "seed": 2}, {"prompt": "a"}, {"prompt": ""}]}'
    codes = [(loc[1], code) for loc, code in problems(registry, text, Format.JSON)]

    assert codes == [(1, "not_an_object"), (2, "duplicate_field"), (4, "blank")]
