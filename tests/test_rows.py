"""A CSV file becomes jobs, or a list of everything that is wrong with it."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom import rows
from darkroom.errors import InvalidInput
from darkroom.params import MAX_SEED


def read(catalogue, text, max_rows=1000):
    body = text if isinstance(text, bytes) else text.encode()
    return rows.read_csv(io.BytesIO(body), catalogue, max_rows=max_rows)


def problems(catalogue, text, **options):
    with pytest.raises(InvalidInput) as refused:
        read(catalogue, text, **options)
    return [(problem.loc, problem.code) for problem in refused.value.problems]


def test_columns_have_short_names_too(catalogue):
    [row] = read(catalogue, "prompt,steps,cfg,negative\na cat,5,2.5,a dog\n")

    assert row.params.num_inference_steps == 5
    assert row.params.guidance_scale == 2.5
    assert row.params.negative_prompt == "a dog"


def test_an_empty_cell_is_the_models_default(catalogue):
    [row] = read(catalogue, "prompt,steps,seed\na cat,,\n")

    assert row.params.num_inference_steps == 12
    assert 0 <= row.params.seed <= MAX_SEED


def test_a_row_may_become_several_images_whose_seeds_count_up(catalogue):
    made = read(catalogue, "prompt,seed,num_images\na cat,7,3\na dog,1,1\n")

    assert [(r.row_number, r.image_number, r.params.seed) for r in made] == [
        (1, 0, 7),
        (1, 1, 8),
        (1, 2, 9),
        (2, 0, 1),
    ]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_what_spreadsheets_write_is_read(catalogue, newline, delimiter, mark):
    lines = [delimiter.join(cells) for cells in (("prompt", "seed"), ("a cat", "7"))]
    [row] = read(catalogue, mark + newline.join(lines) + newline)

    assert (row.params.prompt, row.params.seed) == ("a cat", 7)


def test_row_numbers_are_right_behind_a_quoted_newline(catalogue):
    text = 'prompt,steps\n"a cat\non a mat",5\na dog,0\n'
    assert problems(catalogue, text) == [(("row", 2, "num_inference_steps"), "out_of_range")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt,colour\na,b\n", [(("header", "colour"), "unknown_column")]),
        ("prompt,steps,num_inference_steps\na,1,1\n",
         [(("header", "num_inference_steps"), "doubled_column")]),
        ("seed\n7\n", [(("header",), "missing_column")]),
        ("", [(("header",), "missing_column")]),
        ("prompt\n", [(("file",), "no_rows")]),
        ("prompt,seed\na cat\n", [(("row", 1), "column_count")]),
        ("prompt,seed\na cat,1,2\n", [(("row", 1), "column_count")]),
        ('prompt,seed\na cat,1\n"a dog,2\n', [(("row", 2), "malformed_csv")]),
        ("prompt,seed\na cat,x\n", [(("row", 1, "seed"), "not_a_number")]),
        ("prompt,seed\na cat,1_0\n", [(("row", 1, "seed"), "not_a_number")]),
        (f"prompt,seed\na cat,{'9' * 5000}\n", [(("row", 1, "seed"), "not_a_number")]),
        (f"prompt,seed\na cat,{2**63}\n", [(("row", 1, "seed"), "less_than_equal")]),
        ("prompt,cfg\na cat,nan\n", [(("row", 1, "guidance_scale"), "finite_number")]),
        ("prompt,cfg\na cat,inf\n", [(("row", 1, "guidance_scale"), "finite_number")]),
        ("prompt,width\na cat,97\n", [(("row", 1, "width"), "not_a_multiple")]),
        ("prompt,model\na cat,none\n", [(("row", 1, "model"), "unknown_model")]),
        ("prompt\na\0cat\n", [(("row", 1, "prompt"), "control_character")]),
        (f"prompt\n{'a' * 3000}\n", [(("row", 1, "prompt"), "string_too_long")]),
        (f"prompt\n{'a' * 20_000}\n", [(("row", 1, "prompt"), "field_too_long")]),
        ("prompt,num_images\na cat,0\n", [(("row", 1, "num_images"), "out_of_range")]),
        ("prompt,custom_id\na cat,x\na dog,x\n", [(("row", 2, "custom_id"), "not_unique")]),
        (b"prompt\ncaf\xe9\n", [(("file",), "not_utf8")]),
        (b"prompt\n\xed\xa0\x80\n", [(("file",), "not_utf8")]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_row_and_column(catalogue, text, expected):
    assert problems(catalogue, text) == expected


def test_every_bad_row_is_reported_not_only_the_first(catalogue):
    text = "prompt,steps\n,5\na cat,0\na dog,5\na cow,99\n"
    assert [loc[1] for loc, _ in problems(catalogue, text)] == [1, 2, 4]


def test_more_rows_than_allowed_are_refused(catalogue):
    assert problems(catalogue, "prompt\na\nb\nc\n", max_rows=2) == [(("file",), "too_many_rows")]


prompts = st.text(
    st.characters(blacklist_categories=("Cc", "Cs"), whitelist_characters="\n\t"), min_size=1
).filter(lambda text: text.strip() and len(text) < 2000)


@given(st.lists(prompts, min_size=1, max_size=20))
def test_any_prompts_that_csv_can_write_come_in_unchanged(catalogue, texts):
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["prompt"], *([text] for text in texts)])

    assert [row.params.prompt for row in read(catalogue, table.getvalue())] == texts
