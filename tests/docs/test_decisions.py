"""docs/decisions/README.md lists every record exactly once, with its number and title."""

import re

from darkroom.settings import HOME

RECORDS = HOME / "docs" / "decisions"
ROW = re.compile(
    r"\| (?P<number>\d+) \| \[(?P<title>.+?)\]\((?P<file>\d{4}-[\w-]+\.md)\)"
    r" \| (?P<status>.+) \| (?P<date>\d{4}-\d\d-\d\d) \|"
)


def rows() -> list[dict[str, str]]:
    lines = (RECORDS / "README.md").read_text().splitlines()
    return [match.groupdict() for line in lines if (match := ROW.fullmatch(line))]


def test_the_index_lists_every_record_once_and_in_order():
    records = sorted(path.name for path in RECORDS.glob("[0-9]*.md"))

    assert [row["file"] for row in rows()] == [name for name in records if "0000-" not in name]


def test_the_index_has_the_number_and_title_of_each_record():
    for row in rows():
        heading = (RECORDS / row["file"]).read_text().splitlines()[0]
        assert heading == f"# {row['number']}. {row['title']}"
        assert row["file"].startswith(f"{int(row['number']):04d}-")


def test_a_superseded_record_names_the_newer_one():
    for row in rows():
        assert row["status"].startswith(("accepted", "superseded by [", "proposed", "rejected"))
        for newer in re.findall(r"superseded by \[(\d+)\]\((\d{4})", row["status"]):
            assert int(newer[0]) == int(newer[1]) > int(row["number"])
