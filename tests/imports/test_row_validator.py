"""A file of rows becomes jobs, or a list of everything that is wrong with it."""

import bz2
import csv
import gzip
import io
import json
import lzma

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from darkroom import csv_escape
from darkroom.errors import InvalidInput
from darkroom.generation.params import MAX_SEED
from darkroom.imports import columns, formats, row_validator
from darkroom.imports.formats import UnsupportedFile
from darkroom.imports.records import Record
from darkroom.imports.row_validator import ImportOptions
from darkroom.media_types import Format
from darkroom.settings import Settings
from darkroom.status import PRIORITY_RANK, Expand, Priority
from darkroom.webhooks.url_policy import policy_of
from tests.support.hostile_urls import BLOCKED_AS_TEXT

POLICY = policy_of(Settings())


class Row:
    """All columns of a draft, as attributes: whichever of them are its own."""

    def __init__(self, draft):
        vars(self).update(draft.template.columns | draft._asdict())


def read(registry, text, kind=Format.CSV, *, expand=None, defaults=()):
    """Every job of every row; raises all problems of all rows."""
    body = text if isinstance(text, bytes) else text.encode()
    lists = expand is not None
    plan = ImportOptions(
        registry, POLICY, row_validator.read_defaults(defaults, lists=lists), expand
    )
    made, problems, judge = [], [], row_validator.RowValidator(plan)
    for record in formats.read_table(io.BytesIO(body), kind, lists=lists).records:
        try:
            made += map(Row, judge(record))
        except InvalidInput as invalid:
            problems += invalid.problems
    if problems:
        raise InvalidInput(problems)
    return made


def problems(registry, text, kind=Format.CSV, **options):
    with pytest.raises(InvalidInput) as refused:
        read(registry, text, kind, **options)
    return [(problem.loc, problem.code) for problem in refused.value.problems]


def test_columns_have_short_names_too(registry):
    [row] = read(registry, "prompt,steps,cfg,negative\na cat,5,2.5,a dog\n")

    assert row.num_inference_steps == 5
    assert row.guidance_scale == 2.5
    assert row.negative_prompt == "a dog"


def test_an_empty_cell_is_the_models_default(registry):
    [row] = read(registry, "prompt,steps,seed\na cat,,\n")

    assert row.num_inference_steps == 8
    assert 0 <= row.seed <= MAX_SEED


def test_a_row_may_become_several_images_whose_seeds_count_up(registry):
    made = read(registry, "prompt,seed,num_images\na cat,7,3\na dog,1,1\n")

    assert [(r.row_number, r.image_number, r.seed) for r in made] == [
        (1, 0, 7),
        (1, 1, 8),
        (1, 2, 9),
        (2, 0, 1),
    ]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_what_spreadsheets_write_is_read(registry, newline, delimiter, mark):
    lines = [delimiter.join(cells) for cells in (("prompt", "seed"), ("a cat", "7"))]
    [row] = read(registry, mark + newline.join(lines) + newline)

    assert (row.prompt, row.seed) == ("a cat", 7)


def test_row_numbers_are_right_behind_a_quoted_newline(registry):
    text = 'prompt,steps\n"a cat\non a mat",5\na dog,0\n'
    assert problems(registry, text) == [(("row", 2, "num_inference_steps"), "out_of_range")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt,colour\na,b\n", [(("header", "colour"), "unknown_column")]),
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
def test_what_is_wrong_is_named_by_row_and_column(registry, text, expected):
    assert problems(registry, text) == expected


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


def test_where_a_file_is_not_utf8_is_told_to_the_byte(registry):
    body = b"prompt\n" + "ä cat\n".encode() * 5000 + b"caf\xe9\n"
    with pytest.raises(InvalidInput) as refused:
        read(registry, body)

    [problem] = refused.value.problems
    assert problem.loc == ("row", 5001)
    assert f"0xe9 at offset {len(body) - 2:,}" in problem.message


@pytest.mark.parametrize("text", ['prompt\na "red" apple\n', 'prompt\n"a ""red"" apple"\n'])
def test_quotes_may_stand_in_a_field(registry, text):
    [row] = read(registry, text)
    assert row.prompt == 'a "red" apple'


@pytest.mark.parametrize("text", ["a\u2028cat", "a\u2029cat", "=1+1", "{a|b}"])
def test_what_looks_special_in_a_prompt_is_only_a_prompt(registry, text):
    [row] = read(registry, f"prompt\n{text}\n")
    assert row.prompt == text


def test_numbers_may_come_as_spreadsheets_write_them(registry):
    """pandas writes a column of whole numbers with gaps as floats, German Excel decimal commas."""
    [row] = read(registry, "prompt;seed;cfg\na cat;7.0;4,125\n")
    assert (row.seed, row.guidance_scale) == (7, 4.125)


def test_what_all_rows_have_in_common_need_not_stand_in_them(registry):
    defaults = [("steps", "5"), ("seed", "7"), ("priority", "normal"), ("num_images", "2")]
    made = read(registry, "prompt,seed\na cat,\na dog,1\n", defaults=defaults)

    assert [row.seed for row in made] == [7, 8, 1, 2]
    assert {row.num_inference_steps for row in made} == {5}
    assert {row.priority for row in made} == {PRIORITY_RANK[Priority.NORMAL]}


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


prompts = st.text(
    st.characters(blacklist_categories=("Cc", "Cs"), whitelist_characters="\n\t"),
    min_size=1,
    max_size=200,
).filter(lambda text: text.strip())
COLUMNS = ["prompt", "seed", "guidance_scale", "negative_prompt"]
few = hypothesis_settings(max_examples=40)
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


def came_in(registry, table, file):
    """Whether the file's rows are the table's, in order; what a row left out is not compared."""
    for wanted, row in zip(table, read(registry, file), strict=True):
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
def test_any_table_that_python_writes_comes_in_unchanged(
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
    came_in(registry, table, file.getvalue())


@few
@given(tables, st.booleans())
def test_any_table_that_excel_writes_comes_in_unchanged(registry, table, german):
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
    came_in(registry, table, b"\xef\xbb\xbf" + text.encode())


@given(tables, st.sampled_from(",;\t"), st.sampled_from(["utf-8", "utf-8-sig"]))
@few
def test_any_table_that_pandas_writes_comes_in_unchanged(registry, table, delimiter, encoding):
    file = io.BytesIO()
    pd.DataFrame(table).to_csv(file, index=False, sep=delimiter, encoding=encoding)
    came_in(registry, table, file.getvalue())


@given(st.lists(st.tuples(prompts, st.booleans()), min_size=1, max_size=30))
def test_row_numbers_are_right_whatever_newlines_prompts_hold(registry, made):
    file = io.StringIO(newline="")
    csv.writer(file).writerows(
        [["prompt", "seed"], *((text, "x" if bad else 1) for text, bad in made)]
    )
    wrong = [number for number, (_, bad) in enumerate(made, start=1) if bad]
    try:
        assert len(read(registry, file.getvalue())) == len(made)
        found = []
    except InvalidInput as invalid:
        found = [problem.loc[1] for problem in invalid.problems]

    assert found == wrong


words = st.fixed_dictionaries(
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
values = st.builds(lambda *parts: parts[0] | parts[1], words, shared)


@given(st.lists(values, min_size=2, max_size=12))
def test_what_a_row_shares_with_others_does_not_change_its_verdict(registry, rows_given):
    """Rows behind one another are judged by what is known of the earlier; alone, in full."""

    def verdict(judge, number, fields):
        fields = {columns.canonical(name): value for name, value in fields.items()}
        try:
            drafts = judge(Record(number, fields, []))
        except InvalidInput as invalid:
            return invalid.problems
        made = [Row(draft) for draft in drafts]
        for row in made:
            row.seed = row.seed if fields.get("seed") is not None else "drawn"
            row.template = None
        return [vars(row) for row in made]

    plan = ImportOptions(registry, POLICY)
    together, seen = row_validator.RowValidator(plan), set()
    for number, fields in enumerate(rows_given, start=1):
        doubled = fields.get("custom_id") in seen
        seen |= {fields["custom_id"]} if "custom_id" in fields else set()
        found = verdict(together, number, fields)
        if doubled and isinstance(fields["custom_id"], str):
            assert [problem.code for problem in found] == ["not_unique"]
        else:
            assert found == verdict(row_validator.RowValidator(plan), number, fields)


def test_rows_may_come_as_lines_of_json(registry):
    text = (
        '\ufeff{"prompt": "a cat", "steps": 5, "num_images": 2, "seed": 1}\n\n{"prompt": "a\\ndog"}'
    )
    made = read(registry, text, Format.JSON_LINES)

    assert [(row.row_number, row.image_number) for row in made] == [(1, 0), (1, 1), (2, 0)]
    assert (made[0].num_inference_steps, made[2].prompt) == (5, "a\ndog")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{", ((), "malformed_json")),
        (b"7", ((), "not_an_object")),
        (b'{"prompt": "a", "prompt": "b"}', ((), "duplicate_field")),
        (b'{"prompt": "a", "steps": 1, "num_inference_steps": 2}', ((), "duplicate_field")),
        (b'{"prompt": "a", "colour": "red"}', (("colour",), "unknown_field")),
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
def test_a_bad_line_of_json_is_its_own_rows_fault(registry, line, expected):
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
def test_any_array_of_json_comes_in_unchanged(registry, made, ascii_only, wrapped):
    jobs = [{"prompt": prompt, "seed": seed} for prompt, seed in made]
    text = json.dumps(
        {"jobs": jobs} if wrapped else jobs,
        ensure_ascii=ascii_only,
        indent=None if len(made) % 2 else 2,
    )
    found = read(registry, text, Format.JSON)

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
def test_what_is_no_array_of_jobs_is_refused_as_a_file(registry, text):
    [(loc, code)] = problems(registry, text, Format.JSON)
    assert code in {"malformed_json", "unknown_field", "not_utf8"}, loc


def test_in_an_array_each_bad_job_has_its_own_verdict(registry):
    text = '{"jobs": [7, {"prompt": "a", "seed": 1, "seed": 2}, {"prompt": "a"}, {"prompt": ""}]}'
    codes = [(loc[1], code) for loc, code in problems(registry, text, Format.JSON)]

    assert codes == [(1, "not_an_object"), (2, "duplicate_field"), (4, "blank")]


def test_a_sweep_is_the_product_of_its_choices(registry):
    text = 'prompt,steps,seed\n"a {red|green} {cat|dog}, {really}",4|8,1\n'
    made = read(registry, text, expand=Expand.PRODUCT)

    assert [(row.prompt, row.num_inference_steps) for row in made] == [
        (f"a {colour} {animal}, {{really}}", steps)
        for colour in ("red", "green")
        for animal in ("cat", "dog")
        for steps in (4, 8)
    ]
    assert [row.image_number for row in made] == list(range(8))
    assert {(row.row_number, row.seed) for row in made} == {(1, 1)}


def test_a_sweep_may_go_in_step(registry):
    made = read(registry, "prompt,seed\na {cat|dog},1|2\n", expand=Expand.ZIP)
    assert [(row.prompt, row.seed) for row in made] == [("a cat", 1), ("a dog", 2)]


def test_what_is_not_swept_stays_the_same_even_the_seed_that_was_drawn(registry):
    made = read(registry, "prompt\na {cat|dog|cow}\n", expand=Expand.PRODUCT)
    assert len({row.seed for row in made}) == 1


def test_a_sweep_in_json_lists_its_numbers(registry):
    made = read(
        registry, '{"prompt": "a", "seed": [1, 2]}', Format.JSON_LINES, expand=Expand.PRODUCT
    )
    assert [row.seed for row in made] == [1, 2]


def test_without_being_asked_for_nothing_is_swept(registry):
    [row] = read(registry, "prompt\na {cat|dog}\n")

    assert row.prompt == "a {cat|dog}"
    assert problems(registry, "prompt,steps\na,4|8\n") == [
        (("row", 1, "num_inference_steps"), "not_a_number")
    ]


@pytest.mark.parametrize(
    ("row", "how", "code"),
    [
        ("{a|b},1|2|3", Expand.ZIP, "unequal_list_lengths"),
        ("{a|b},1|x", Expand.PRODUCT, "not_a_number"),
        ("{|},1", Expand.PRODUCT, "blank"),
        ("{a|b}" * 20 + ",1", Expand.PRODUCT, "too_many_variants"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(registry, row, how, code):
    found = problems(registry, f"prompt,seed\n{row}\n", expand=how)
    assert code in {code for _, code in found}


def test_one_row_makes_no_more_jobs_than_it_may(registry):
    text = "prompt,num_images\n" + "{a|b|c|d|e|f}" * 3 + ",100\n"
    [(loc, code)] = problems(registry, text, expand=Expand.PRODUCT)
    assert (loc[-1], code) == ("num_images", "too_many_jobs")


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0", "PNG"),
        (b"\xff\xd8\xff\xe0", "JPEG"),
        (b"GIF89a", "GIF"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "WebP"),
        (gzip.compress(b"prompt\na\n", mtime=0), "gzip"),
        (b"PK\x03\x04" + b"\0" * 26 + b"[Content_Types].xml", "XLSX"),
        (b"PK\x03\x04" + b"\0" * 26 + b"prompts.csv", "ZIP"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "XLS"),
        (b"%PDF-1.7", "PDF"),
        (b"PK\x03\x04" + b"\0" * 26 + b"[Content_Types].xml ... word/document.xml", "DOCX"),
        (
            b"PK\x03\x04" + b"\0" * 26 + b"mimetypeapplication/vnd.oasis.opendocument",
            "OpenDocument",
        ),
        (b"PK\x05\x06" + b"\0" * 18, "ZIP"),
        (bz2.compress(b"prompt\na\n"), "bzip2"),
        (lzma.compress(b"prompt\na\n"), "xz"),
        (b"PAR1\x15\x04", "Parquet"),
        (b"\x7fELF\x02\x01", "binary"),
        (b"prompts.csv" + b"\0" * 89 + b"0000644\0", "binary"),
        (b"\0" * 2000, "binary"),
        ("\u043f\u0440,prompt\na,\n".encode("utf-16-le"), "UTF-16"),
        ("\u043f\u0440,Prompt\na,\n".encode("utf-16-be"), "UTF-16"),
        ("seed,prompt\n1,a\n".encode("utf-32-le"), "UTF-32"),
        ("prompt\na\n".encode("utf-16"), "UTF-16"),
        ("prompt\na\n".encode("utf-16-le"), "UTF-16"),
        ("prompt\na\n".encode("utf-16-be"), "UTF-16"),
        ("prompt\na\n".encode("utf-32"), "UTF-32"),
        (b"\n<!DOCTYPE html><html>", "HTML"),
        (b"\xef\xbb\xbf<html lang=en>", "HTML"),
        (b"<?xml version='1.0'?>", "XML"),
    ],
)
@pytest.mark.parametrize("kind", Format)
def test_what_only_claims_to_be_rows_is_refused_by_name(registry, body, name, kind):
    with pytest.raises(UnsupportedFile, match=name):
        read(registry, body, kind)


@pytest.mark.parametrize(
    "text", ['{"prompt": "a"}\n', '[{"prompt": "a"}]', '\ufeff {"jobs": []}', "[]", "[[1]]"]
)
def test_json_that_is_called_csv_is_told_what_to_be_sent_as(registry, text):
    with pytest.raises(UnsupportedFile, match="application/json"):
        read(registry, text)


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@a", "\ta", "\ra", "\0a", "'=1", "''=1"])
def test_a_formula_is_escaped_and_comes_back(cell):
    assert csv_escape.escape(cell) == f"'{cell}"
    assert csv_escape.unescape(csv_escape.escape(cell)) == cell


@few
@given(st.text(max_size=5))
def test_escaping_loses_nothing(cell):
    assert csv_escape.unescape(csv_escape.escape(cell)) == cell
    assert csv_escape.escape(cell)[:1] not in set("=+-@\t\r\0")
