"""The documentation site: links as the site needs them, and reference pages of what is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from darkroom.settings import HOME, Settings
from tools.docs import links, openapi, settings
from tools.docs.cli import commands

PAGES = {"ARCHITECTURE.md": "architecture.md"}


def rewritten(markdown: str, page: str) -> str:
    return links.rewrite(markdown, page=page, source=f"docs/{page}", pages=PAGES, root=HOME)


@pytest.mark.parametrize(
    ("link", "on_the_site"),
    [
        ("[a](chaos.md#top)", "[a](../chaos.md#top)"),
        ("[a](../ARCHITECTURE.md)", "[a](../architecture.md)"),
        ("[a](decisions)", "[a](../decisions/README.md)"),
        ("[rules](../deploy/nftables)", "rules (`deploy/nftables`)"),
        ("[Makefile](../Makefile)", "`Makefile`"),
        ("[a](../no-such-file)", "[a](../no-such-file)"),
        ("[a](https://example.com/docs/chaos.md)", "[a](https://example.com/docs/chaos.md)"),
        ("[1]: chaos.md", "[1]: ../chaos.md"),
        ("![a](contact-sheet.png)", "![a](contact-sheet.png)"),
    ],
)
def test_links_lead_to_pages_of_the_site(link, on_the_site):
    text = links.rewrite(link, page="how-to/x.md", source="docs/x.md", pages=PAGES, root=HOME)

    assert text == on_the_site


def test_a_page_keeps_its_links_to_its_neighbors():
    assert (
        rewritten("[a](b.md) and [c](../chaos.md)", "how-to/a.md")
        == "[a](b.md) and [c](../chaos.md)"
    )


def test_the_settings_page_has_a_row_for_each_setting():
    rows = settings.table().splitlines()[2:]

    assert [row.split("`")[1] for row in rows] == [
        f"DARKROOM_{name.upper()}" for name in Settings.model_fields
    ]
    assert all(len(re.split(r"(?<!\\)\|", row)) == 6 for row in rows)


def test_the_http_pages_have_each_operation_and_each_schema_that_they_name():
    document = openapi.document()
    pages = openapi.pages(document)
    anchors = {anchor for text in pages.values() for anchor in re.findall(r"\{ #(\w+) \}", text)}

    for path, item in document["paths"].items():
        for method, operation in item.items():
            assert f"`{method.upper()} {path}`" in openapi.index(document)
            assert operation["operationId"] in anchors
    assert set(document["components"]["schemas"]) <= anchors
    named = {name for text in pages.values() for name in re.findall(r"schemas\.md#(\w+)", text)}
    assert named <= anchors


def test_the_command_line_page_has_each_command():
    page = commands(HOME)

    for command in ("up", "submit", "batch submit", "webhooks add", "admin drain", "keys create"):
        assert f"# `darkroom {command}`" in page


@pytest.mark.timeout(300)  # it hangs: a build takes 10 s
def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=HOME,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    pages = list(Path(tmp_path).rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        text = page.read_text()
        assert not re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"?https?:", text), page
        assert "<!-- generated" not in text, page
