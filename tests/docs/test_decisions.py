"""docs/decisions/README.md lists every record exactly once, with its number and title."""

import re

from darkroom.settings import HOME

RECORDS = HOME / "docs" / "decisions"
INDEX = (RECORDS / "README.md").read_text()
ENTRIES = re.findall(r"^(\d+)\. \[(.+)\]\[(\d+)\]\n +\d{4}-\d\d-\d\d, (.+)$", INDEX, re.MULTILINE)
FILES = dict(re.findall(r"^\[(\d+)\]: (\S+)$", INDEX, re.MULTILINE))


def test_the_index_lists_every_record_once_and_in_order():
    records = sorted(path.name for path in RECORDS.glob("[0-9]*.md"))

    assert [FILES[link] for _, _, link, _ in ENTRIES] == records[1:]
    assert records[0] == "0000-template.md"
    assert len(FILES) == len(ENTRIES)


def test_the_index_has_the_number_and_title_of_each_record():
    for number, title, link, _ in ENTRIES:
        heading = (RECORDS / FILES[link]).read_text().splitlines()[0]
        assert number == link
        assert heading == f"# {number}. {title}"
        assert FILES[link].startswith(f"{int(number):04d}-")


def test_a_superseded_record_and_its_entry_name_the_newer_one():
    for number, _, link, status in ENTRIES:
        text = (RECORDS / FILES[link]).read_text().lower()
        newer = re.findall(r"superseded by \[(\d+)\]", status)
        assert status in {"accepted", "proposed", "rejected"} or newer
        assert re.findall(r"superseded by \[decision (\d+)\]", text) == newer
        assert all(each in FILES and int(each) > int(number) for each in newer)
