"""Links of a page: as the repository has them, to as the site needs them."""

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_INLINE: Final = re.compile(
    r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>(?!\w+:)[^)\s#]+)(?P<anchor>#[^)\s]*)?\)"
)
_DEFINITION: Final = re.compile(
    r"^(?P<label>\[[^\]]+\]: )(?P<target>(?!\w+:)[^\s#]+)(?P<anchor>#\S*)?$", re.MULTILINE
)


def rewrite(markdown: str, *, page: str, source: str, pages: Mapping[str, str], root: Path) -> str:
    """Return the text of `page`, which stands in the repository as `source`.

    `pages` names the site's page for a file outside docs/. A link to a file that the site lacks
    becomes its path; a link to a file that does not exist stays, and MkDocs reports it.
    """
    folder = posixpath.dirname(page) or "."

    def path_of(match: re.Match[str]) -> str:
        return posixpath.normpath(posixpath.join(posixpath.dirname(source), match["target"]))

    def inline(match: re.Match[str]) -> str:
        path, text, anchor = path_of(match), match["text"], match["anchor"] or ""
        if goal := _page_of(path, pages, root):
            return f"[{text}]({posixpath.relpath(goal, folder)}{anchor})"
        if _is_file(path, root):
            return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"
        return match[0]

    def definition(match: re.Match[str]) -> str:
        goal = _page_of(path_of(match), pages, root)
        if goal is None:
            return match[0]
        return f"{match['label']}{posixpath.relpath(goal, folder)}{match['anchor'] or ''}"

    return _DEFINITION.sub(definition, _INLINE.sub(inline, markdown))


def _page_of(path: str, pages: Mapping[str, str], root: Path) -> str | None:
    if path in pages:
        return pages[path]
    if not path.startswith("docs/"):
        return None
    inside = path.removeprefix("docs/")
    return f"{inside}/README.md" if (root / path).is_dir() else inside


def _is_file(path: str, root: Path) -> bool:
    return not path.startswith("..") and (root / path).exists()
