"""Links of a page: as the repository has them, to as the site needs them."""

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

LINK: Final = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
_ELSEWHERE: Final = ("http:", "https:", "mailto:")


def rewrite(markdown: str, *, page: str, source: str, pages: Mapping[str, str], root: Path) -> str:
    """Return the text of `page`, which stands in the repository as `source`.

    `pages` names the site's page for a file outside docs/. A link to a file that the site lacks
    becomes its path; a link to a file that does not exist stays, and MkDocs reports it.
    """

    def replaced(match: re.Match[str]) -> str:
        text, target, anchor = match["text"], match["target"], match["anchor"] or ""
        if target.startswith(_ELSEWHERE):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if goal := _page_of(path, pages, root):
            return f"[{text}]({posixpath.relpath(goal, posixpath.dirname(page) or '.')}{anchor})"
        if (root / path).exists() and not path.startswith(".."):
            return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"
        return match[0]

    return LINK.sub(replaced, markdown)


def _page_of(path: str, pages: Mapping[str, str], root: Path) -> str | None:
    if path in pages:
        return pages[path]
    if not path.startswith("docs/"):
        return None
    inside = path.removeprefix("docs/")
    return f"{inside}/README.md" if (root / path).is_dir() else inside
