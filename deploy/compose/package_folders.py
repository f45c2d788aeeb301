"""Empty packages in place of ours, so that they can be installed before they are copied."""

# ruff: noqa: INP001  # a script of the Dockerfile

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text())
for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]:
    folder = Path(pattern.removesuffix("*"))  # an editable install maps only top-level packages
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").touch()  # without it, setuptools takes the folder for a namespace
