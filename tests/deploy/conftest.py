"""Fixtures of the deployment tests: the Compose file, and the secrets made for it."""

import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.compose_files import COMPOSE, MAKE_SECRETS


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load(COMPOSE.read_text())


@pytest.fixture(scope="module")
def services(compose) -> dict[str, dict]:
    return compose["services"]


@pytest.fixture(scope="module")
def secrets_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compose") / "secrets"
    subprocess.run([MAKE_SECRETS, folder], check=True, capture_output=True)
    return folder
