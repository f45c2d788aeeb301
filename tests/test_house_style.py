"""Words, lengths and links of code and docs; an honest exception says `# style: <reason>`."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COLUMNS = 100
INSTEAD = {
    "nobody|somebody|whoever|whom": "the subject: the worker, the client, the lease",
    "anew": "again",
    "reckoned": "computed",
    "colour|licence": "American spelling: color, license",
}
EXEMPT = {Path(__file__).name, "glossary.md"}  # both name the words that are not used
URL_ALONE = re.compile(r"\W*(\[[^]]*\][:(]? ?)?<?https?://\S+")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
PATH_IN_CODE = re.compile(r"`([\w.-]+(?:/[\w.-]+)+\.(?:py|sh|nft|yml|yaml|pbtxt))`")


def tracked(*patterns):
    command = ["git", "ls-files", *patterns]
    return subprocess.check_output(command, cwd=ROOT, text=True).splitlines()


MARKDOWN = tracked("*.md")
CODE = tracked("*.py", "*.toml", "*.yml")
TOP_LEVEL = {name.partition("/")[0] for name in tracked()}


def lines_of(names):
    for name in names:
        for number, line in enumerate((ROOT / name).read_text("utf-8").splitlines(), 1):
            yield f"{name}:{number}", line


def assert_no_line_uses(words, names):
    pattern = re.compile(rf"\b({words})\b", re.IGNORECASE)
    found = [
        place
        for place, line in lines_of(name for name in names if Path(name).name not in EXEMPT)
        if pattern.search(line) and "# style:" not in line
    ]
    assert not found, f"write {INSTEAD[words]!r} instead in: {', '.join(found[:20])}"


@pytest.mark.parametrize("words", INSTEAD)
def test_no_markdown_line_uses(words):
    assert_no_line_uses(words, MARKDOWN)


@pytest.mark.parametrize("words", INSTEAD)
def test_no_line_of_code_uses(words):
    assert_no_line_uses(words, CODE)


def test_no_markdown_line_is_longer_than_100_columns():
    found = [
        f"{place} ({len(line)})"
        for place, line in lines_of(MARKDOWN)
        if len(line) > COLUMNS and not URL_ALONE.fullmatch(line.strip())
    ]
    assert not found, f"wrap at {COLUMNS} columns: {', '.join(found[:20])}"


def test_every_relative_link_of_markdown_leads_to_a_file():
    found = [
        f"{place} {target}"
        for place, line in lines_of(MARKDOWN)
        for target in LINK.findall(line)
        if "://" not in target and not (ROOT / place).parent.joinpath(target).exists()
    ]
    assert not found, f"these links lead nowhere: {', '.join(found[:20])}"


def test_every_file_of_the_repository_that_markdown_names_exists():
    found = [
        f"{place} {path}"
        for place, line in lines_of(MARKDOWN)
        for path in PATH_IN_CODE.findall(line)
        if path.partition("/")[0] in TOP_LEVEL and not (ROOT / path).exists()
    ]
    assert not found, f"these files do not exist: {', '.join(found[:20])}"
