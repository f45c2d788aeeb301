"""Reference page of the command line, as typer prints it."""

import subprocess
import sys
from html import unescape
from pathlib import Path


def commands(root: Path) -> str:
    """Return every command with its arguments and options."""
    argv = [sys.executable, "-m", "typer", "darkroom.cli", "utils", "docs", "--name", "darkroom"]
    printed = subprocess.run(argv, cwd=root, check=True, capture_output=True, text=True).stdout
    return "\n".join(_readable(line) for line in printed.splitlines()[1:])  # without its title


def _readable(line: str) -> str:
    """Undo the HTML entities, except where Markdown would read the characters as HTML."""
    return line.replace("&#x27;", "'").replace("&quot;", '"') if "`" in line else unescape(line)
