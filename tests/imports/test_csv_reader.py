"""CSV in every dialect that spreadsheets and programs write, and what is wrong with it by row."""

import csv
import io

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.errors import InvalidInput
from darkroom.generation.params import MAX_SEED
from tests.support.import_rows import few, problems, prompts, read_jobs


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_dialect_of_spreadsheets_is_read(registry, newline, delimiter, mark):
    lines = [delimiter.join(cells) for cells in (("prompt", "seed"), ("a cat", "7"))]
    [row] = read_jobs(registry, mark + newline.join(lines) + newline)

    assert (row.prompt, row.seed) == ("a cat", 7)


def test_row_numbers_are_right_after_a_quoted_newline(registry):
    text = 'prompt,steps\n"a cat\non a mat",5\na dog,0\n'
    assert problems(registry, text) == [(("row", 2, "num_inference_steps"), "out_of_range")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt,color\na,b\n", [(("header", "color"), "unknown_column")]),
        ("prompt,\na,b\n", [(("header", ""), "unknown_column")]),
        ("prompt,steps,num_inference_steps\na,1,1\n",
         [(("header", "num_inference_steps"), "duplicate_column")]),
        ("seed\n7\n", [(("header",), "missing_column")]),
        ("", [(("header",), "missing_column")]),
        ("sep=;\nprompt;seed\na;1\n", [(("header",), "delimiter")]),
        ('\ufeff"SEP=,"\r\nprompt\r\na\r\n', [(("header",), "delimiter")]),
        ("sep=\t\nprompt\tseed\na\t1\n", [(("header",), "delimiter")]),
        ("\ufeff", [(("header",), "missing_column")]),
        ("\n\n\n", [(("header",), "missing_column")]),
        ("   \n  \n", [(("header", ""), "unknown_column")]),
        ("\ufeff\ufeffprompt\na\n", [(("header", "\ufeffprompt"), "unknown_column")]),
        ("prompt|seed\na|1\n", [(("header", "prompt|seed"), "unknown_column")]),
        ("prompt,Prompt \na,b\n", [(("header", "prompt"), "duplicate_column")]),
        ("prompt,seed\na,1\n   \nb,x\n",
         [(("row", 2), "column_count"), (("row", 3, "seed"), "not_a_number")]),
        ("prompt\na\n   \n", [(("row", 2, "prompt"), "missing_field")]),
        ("prompt\n" + '"' * 9999 + "\n", [(("row", 1), "malformed_csv")]),
        ("prompt,seed\na,1e3\n", [(("row", 1, "seed"), "not_a_number")]),
        ("prompt,seed\na,0x10\n", [(("row", 1, "seed"), "not_a_number")]),
        ("prompt,seed\na,true\n", [(("row", 1, "seed"), "not_a_number")]),
        ("prompt,seed\na,-1\n", [(("row", 1, "seed"), "greater_than_equal")]),
        ("prompt,seed\na,\uff11\n", [(("row", 1, "seed"), "not_a_number")]),
        ("prompt,seed\na,\u00b2\n", [(("row", 1, "seed"), "not_a_number")]),
        ("prompt,cfg\na,1e400\n", [(("row", 1, "guidance_scale"), "finite_number")]),
        ("prompt,cfg\na,-Infinity\n", [(("row", 1, "guidance_scale"), "finite_number")]),
        ('prompt,metadata\na,"{""k"": ""v"", ""k"": ""w""}"\n',
         [(("row", 1, "metadata"), "not_json")]),
        ('prompt,metadata\na,"{""k"": ""\\u0000""}"\n',
         [(("row", 1, "metadata", "k"), "control_character")]),
        ("prompt,metadata\na," + "[" * 10_000 + "\n", [(("row", 1, "metadata"), "not_json")]),
        ("prompt" + ",seed" * 9999 + "\n", [(("header",), "too_many_columns")]),
        ("prompt,seed\na cat\n", [(("row", 1), "column_count")]),
        ("prompt,seed\na cat,1,2\n", [(("row", 1), "column_count")]),
        ("prompt,seed\na cat" + "," * 100_000 + "\n", [(("row", 1), "column_count")]),
        ("prompt,seed\na cat,1\n\x1a", [(("row", 2), "column_count")]),
        ('prompt,seed\na cat,1\n"a dog,2\n', [(("row", 2), "malformed_csv")]),
        ('prompt,seed\n"a" cat,1\na dog,x\n',
         [(("row", 1), "malformed_csv"), (("row", 2, "seed"), "not_a_number")]),
        ("prompt,seed\na cat,x\n", [(("row", 1, "seed"), "not_a_number")]),
        ("prompt,seed\na cat,1_0\n", [(("row", 1, "seed"), "not_a_number")]),
        ("prompt,seed\na cat,1.5\n", [(("row", 1, "seed"), "not_a_number")]),
        ("prompt,seed\na cat,\u0663\n", [(("row", 1, "seed"), "not_a_number")]),
        (f"prompt,seed\na cat,{'9' * 5000}\n", [(("row", 1, "seed"), "not_a_number")]),
        (f"prompt,seed\na cat,{2**63}\n", [(("row", 1, "seed"), "less_than_equal")]),
        ("prompt,cfg\na cat,nan\n", [(("row", 1, "guidance_scale"), "finite_number")]),
        ("prompt,cfg\na cat,inf\n", [(("row", 1, "guidance_scale"), "finite_number")]),
        ('prompt,cfg\na cat,"4,5"\n', [(("row", 1, "guidance_scale"), "not_a_number")]),
        ("prompt,width\na cat,97\n", [(("row", 1, "width"), "not_a_multiple")]),
        ("prompt,model\na cat,none\n", [(("row", 1, "model"), "unknown_model")]),
        ("prompt,metadata\na cat,{\n", [(("row", 1, "metadata"), "not_json")]),
        ("prompt\na\0cat\n", [(("row", 1, "prompt"), "control_character")]),
        ("prompt\na\x0b\x0c\x1ccat\n", [(("row", 1, "prompt"), "control_character")]),
        ("prompt,custom_id\na cat,\0\n", [(("row", 1, "custom_id"), "control_character")]),
        (f"prompt\n{'a' * 3000}\n", [(("row", 1, "prompt"), "string_too_long")]),
        (f"prompt\n{'a' * 200_000}\na\0\n",
         [(("row", 1, "prompt"), "field_too_long"), (("row", 2, "prompt"), "control_character")]),
        (f"prompt\na\n{'a' * 2**20}b\n", [(("row", 2), "malformed_csv")]),
        (f"prompt\na\n{'a' * 2**21}b\n", [(("row", 2), "row_too_long")]),
        ("prompt,webhook_url\na cat,https://127.0.0.1/\n",
         [(("row", 1, "webhook_url"), "url_not_allowed")]),
        ("prompt,webhook_events\na cat,x\n", [(("row", 1, "webhook_events"), "not_json")]),
        ("prompt,num_images\na cat,0\n", [(("row", 1, "num_images"), "greater_than_equal")]),
        ("prompt,num_images\na cat,101\n", [(("row", 1, "num_images"), "less_than_equal")]),
        (f"prompt,seed,num_images\na,{MAX_SEED},2\n", [(("row", 1, "seed"), "out_of_range")]),
        ("prompt,custom_id\na cat,x\na dog,x\n", [(("row", 2, "custom_id"), "not_unique")]),
        ("prompt,seed,cfg\n,x,y\n", [
            (("row", 1, "seed"), "not_a_number"),
            (("row", 1, "guidance_scale"), "not_a_number"),
            (("row", 1, "prompt"), "missing_field")]),
        (b"prompt\na cat\ncaf\xe9\n", [(("row", 2), "not_utf8")]),
        (b"prompt\n\xed\xa0\x80\n", [(("row", 1), "not_utf8")]),
        (b"prompt\n\xc0\xaf\n", [(("row", 1), "not_utf8")]),
        (b"caf\xe9\n", [(("header",), "not_utf8")]),
    ],
)  # fmt: skip
def test_every_problem_names_its_row_and_column(registry, text, expected):
    assert problems(registry, text) == expected


def test_the_first_byte_that_is_not_utf8_is_reported_by_offset(registry):
    body = b"prompt\n" + "ä cat\n".encode() * 5000 + b"caf\xe9\n"
    with pytest.raises(InvalidInput) as refused:
        read_jobs(registry, body)

    [problem] = refused.value.problems
    assert problem.loc == ("row", 5001)
    assert f"0xe9 at offset {len(body) - 2:,}" in problem.message


@pytest.mark.parametrize("text", ['prompt\na "red" apple\n', 'prompt\n"a ""red"" apple"\n'])
def test_a_field_may_contain_quotes(registry, text):
    [row] = read_jobs(registry, text)
    assert row.prompt == 'a "red" apple'


@pytest.mark.parametrize("text", ["a\u2028cat", "a\u2029cat", "=1+1", "{a|b}"])
def test_special_characters_in_a_prompt_have_no_meaning(registry, text):
    [row] = read_jobs(registry, f"prompt\n{text}\n")
    assert row.prompt == text


def test_numbers_may_come_as_spreadsheets_write_them(registry):
    """pandas writes a column of whole numbers with gaps as floats, German Excel decimal commas."""
    [row] = read_jobs(registry, "prompt;seed;cfg\na cat;7.0;4,125\n")
    assert (row.seed, row.guidance_scale) == (7, 4.125)


COLUMNS = ["prompt", "seed", "guidance_scale", "negative_prompt"]


tables = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": prompts,
            "seed": st.none() | st.integers(0, MAX_SEED),
            "guidance_scale": st.none() | st.floats(0, 20),
            "negative_prompt": st.just("") | prompts,
        }
    ),
    min_size=1,
    max_size=10,
)


def assert_reads_as(registry, table, file):
    """Compare the file's rows with the table's, in order, except for empty cells."""
    for wanted, row in zip(table, read_jobs(registry, file), strict=True):
        for column, value in wanted.items():
            if value is not None:
                assert getattr(row, column) == value


@few
@given(
    tables,
    st.sampled_from(",;\t"),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
)
def test_any_table_that_python_writes_is_read_unchanged(
    registry, table, delimiter, newline, quoting
):
    if newline == "\r":  # with which Python 3.11 leaves a `\n` in a field bare
        quoting = csv.QUOTE_ALL
    file = io.StringIO(newline="")
    writer = csv.DictWriter(
        file, COLUMNS, delimiter=delimiter, lineterminator=newline, quoting=quoting
    )
    writer.writeheader()
    writer.writerows(table)
    assert_reads_as(registry, table, file.getvalue())


@few
@given(tables, st.booleans())
def test_any_table_that_excel_writes_is_read_unchanged(registry, table, german):
    """Quotes where needed, CRLF, a byte order mark; in half of the world `;` and `4,5`."""

    def cell(value):
        text = "" if value is None else str(value)
        if german and isinstance(value, float):
            text = text.replace(".", ",")
        if any(character in text for character in (";" if german else ",") + '"\n\t'):
            return '"' + text.replace('"', '""') + '"'
        return text

    lines = [COLUMNS, *([row[column] for column in COLUMNS] for row in table)]
    text = "".join((";" if german else ",").join(map(cell, line)) + "\r\n" for line in lines)
    assert_reads_as(registry, table, b"\xef\xbb\xbf" + text.encode())


@given(tables, st.sampled_from(",;\t"), st.sampled_from(["utf-8", "utf-8-sig"]))
@few
def test_any_table_that_pandas_writes_is_read_unchanged(registry, table, delimiter, encoding):
    file = io.BytesIO()
    pd.DataFrame(table).to_csv(file, index=False, sep=delimiter, encoding=encoding)
    assert_reads_as(registry, table, file.getvalue())


@given(st.lists(st.tuples(prompts, st.booleans()), min_size=1, max_size=30))
def test_row_numbers_are_right_with_any_newlines_in_prompts(registry, rows):
    file = io.StringIO(newline="")
    csv.writer(file).writerows(
        [["prompt", "seed"], *((text, "x" if bad else 1) for text, bad in rows)]
    )
    wrong = [number for number, (_, bad) in enumerate(rows, start=1) if bad]
    try:
        assert len(read_jobs(registry, file.getvalue())) == len(rows)
        found = []
    except InvalidInput as invalid:
        found = [problem.loc[1] for problem in invalid.problems]

    assert found == wrong
