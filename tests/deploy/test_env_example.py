"""`.env.example` describes every variable, with the default of the code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import SecretStr

from darkroom.settings import HOME, Settings

LINE = re.compile(r"#?(?P<name>[A-Z][A-Z0-9_]*)=(?P<value>.*)")
#: Read elsewhere: by the client, by `load_settings`, by docker-compose.yml.
NOT_SETTINGS = {
    "COMPOSE_PROFILES",
    "DARKROOM_API",
    "DARKROOM_API_KEY",
    "DARKROOM_PUBLISH",
    "DARKROOM_S3_PORT",
    "DARKROOM_SECRETS_DIR",
    "DARKROOM_VERSION",
    "RAY_MEMORY",
    "TORCH_INDEX",
}


def documented() -> dict[str, tuple[str, str]]:
    """Return the value of each variable, and the comment before it."""
    found: dict[str, tuple[str, str]] = {}
    comment = ""
    for line in (HOME / ".env.example").read_text().splitlines():
        if variable := LINE.fullmatch(line):
            assert variable["name"] not in found, f"{variable['name']} is listed twice"
            found[variable["name"]] = (variable["value"], comment.strip())
            comment = ""
        else:
            comment = f"{comment} {line.removeprefix('#').strip()}" if line else ""
    return found


def default_of(field: str) -> str:
    match Settings.model_fields[field].default:
        case None:
            return ""
        case SecretStr() as secret:
            return secret.get_secret_value()
        case Path() as path:
            return str(path.relative_to(HOME))
        case plain:
            return str(plain)


def test_every_setting_is_listed_and_no_other():
    settings = {f"DARKROOM_{field.upper()}" for field in Settings.model_fields}

    assert set(documented()) - NOT_SETTINGS == settings


def test_the_defaults_are_those_of_the_code():
    written = {name: value for name, (value, _) in documented().items()}

    for field in Settings.model_fields:
        name = f"DARKROOM_{field.upper()}"
        assert written[name] == default_of(field), name


def test_every_variable_is_explained_in_a_sentence():
    for name, (_, comment) in documented().items():
        assert re.fullmatch(r".*[A-Za-z]{2}.*[.\w]", comment), f"{name}: {comment!r}"


def test_an_unedited_copy_sets_only_the_profile():
    active = [
        line
        for line in (HOME / ".env.example").read_text().splitlines()
        if line and not line.startswith("#")
    ]

    assert active == ["COMPOSE_PROFILES=cpu"]


def test_variables_of_compose_have_the_same_default():
    written = {name: value for name, (value, _) in documented().items()}
    files = [HOME / "docker-compose.yml", HOME / "deploy" / "compose" / "publish-s3.yml"]

    for file in files:
        for name, default in re.findall(r"(?<!\$)\$\{([A-Z0-9_]+):-([^}]*)\}", file.read_text()):
            if name != "DARKROOM_S3_ENDPOINT_URL":  # AWS without Compose, its own server with it
                assert written[name] == default, f"{name} in {file.name}"


def test_compose_knows_the_profile():
    services = yaml.safe_load((HOME / "docker-compose.yml").read_text())["services"]

    assert documented()["COMPOSE_PROFILES"][0] in {
        profile for service in services.values() for profile in service.get("profiles", [])
    }


def test_an_empty_variable_counts_as_unset(monkeypatch):
    usual = Settings()
    for name, (value, _) in documented().items():
        if not value:
            monkeypatch.setenv(name, "")

    assert Settings() == usual


@pytest.mark.parametrize(
    "process", ["api", "workers run", "workers send-webhooks", "darkroom.cli up"]
)
def test_no_process_starts_with_an_invalid_value_or_prints_it(process):
    unusable = {"DARKROOM_LEASE_S": "secret", "DARKROOM_API_PORT": "-1"}
    done = subprocess.run(
        [sys.executable, "-m", *process.split()],
        env=os.environ | unusable,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.returncode == 2
    assert all(f"error: {name} should be " in done.stderr for name in unusable), done.stderr
    assert "secret" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
