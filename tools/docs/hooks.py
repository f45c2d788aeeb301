"""MkDocs hooks: the reference pages, made from the code, and the pages that lie outside docs/."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools.docs import cli, links, openapi, settings

ROOT: Final = Path(__file__).resolve().parents[2]
#: Pages of the site whose text stands in the root of the repository.
FROM_ROOT: Final = {
    "architecture.md": "ARCHITECTURE.md",
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "code-of-conduct.md": "CODE_OF_CONDUCT.md",
    "contributing.md": "CONTRIBUTING.md",
    "releasing.md": "RELEASE.md",
    "security.md": "SECURITY.md",
    "upgrading.md": "UPGRADING.md",
}
#: What `<!-- generated: NAME -->` stands for.
GENERATED: Final[dict[str, Callable[[], str]]] = {
    "cli": lambda: cli.commands(ROOT),
    "http": lambda: openapi.index(openapi.document()),
    "settings": settings.table,
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Watch the sources of the generated pages, and list every decision in the navigation."""
    config.watch.extend(str(ROOT / name) for name in ("api", "darkroom", "tools"))
    records = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))[1:]  # without the template
    for section in config.nav or []:
        if isinstance(section, dict) and "Decisions" in section:
            section["Decisions"] += [f"decisions/{path.name}" for path in records]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that docs/ does not have."""
    pages = {
        **{name: (ROOT / source).read_text("utf-8") for name, source in FROM_ROOT.items()},
        **openapi.pages(openapi.document()),
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is generated, and point links at pages of the site."""
    del config, files
    for name, text in GENERATED.items():
        marker = f"<!-- generated: {name} -->"
        if marker in markdown:
            markdown = markdown.replace(marker, text())
    source = FROM_ROOT.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    pages = {source: page for page, source in FROM_ROOT.items()}
    return links.rewrite(markdown, page=page.file.src_uri, source=source, pages=pages, root=ROOT)
