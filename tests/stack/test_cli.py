"""The `darkroom` command as a person and a program type it, against an API without workers."""

import json
import os
import pty
import re
import subprocess
import sys

import numpy as np
import psycopg
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from darkroom.cli import app
from darkroom.cli.job import GENERATION_FIELDS
from darkroom.generation import image_codec
from darkroom.generation.params import GenerationParams
from darkroom.local.ports import free_port
from darkroom.status import OutputFormat


@pytest.fixture
def darkroom(api_url):
    """Runs the command in this process; what it printed, and how it left."""

    def run(*words, api=api_url, database=""):
        environment = {"DARKROOM_API": api, "DARKROOM_DATABASE_URL": database}
        environment |= {"NO_COLOR": "1", "COLUMNS": "100"}
        return CliRunner(env=environment).invoke(app, [*map(str, words)])

    return run


def process(*words, **environment):
    """The command and its environment, for a process of its own."""
    argv = [sys.executable, "-m", "darkroom.cli", *words]
    return {"args": argv, "env": os.environ | {"COLUMNS": "100"} | environment}


def test_a_prompt_becomes_a_job(darkroom):
    done = darkroom("submit", "a red apple", "--seed", 7, "--steps", 5, "--guidance", 2.5)

    assert done.exit_code == 0, done.stderr
    job = json.loads(done.stdout)
    assert job["input"]["seed"] == 7
    assert job["input"]["num_inference_steps"] == 5
    assert json.loads(darkroom("job", "show", job["id"]).stdout) == job


def test_a_file_becomes_a_batch(darkroom, tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text("prompt\na cat\na dog\n")
    batch = json.loads(darkroom("batch", "submit", file, "--label", "pets").stdout)

    assert (batch["counts"]["total"], batch["label"]) == (2, "pets")
    assert json.loads(darkroom("batch", "show", batch["id"]).stdout)["id"] == batch["id"]


def test_the_errors_of_a_file_are_listed_row_by_row(darkroom, tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,steps\na cat,0\n,3\n")
    done = darkroom("batch", "submit", file)

    assert done.exit_code == 2
    assert "row.1.num_inference_steps" in done.stderr
    assert "row.2.prompt" in done.stderr


def test_an_unreachable_server_has_an_exit_code_of_its_own(darkroom):
    done = darkroom("submit", "a cat", api=f"http://127.0.0.1:{free_port()}")

    assert done.exit_code == 3
    assert "darkroom up" in done.stderr


@pytest.mark.parametrize(
    "words", [["submit"], ["job", "show", "job_nonsense"], ["batch", "submit", "/nowhere.csv"]]
)
def test_a_mistake_exits_with_two(darkroom, words):
    assert darkroom(*words).exit_code == 2


def test_an_image_is_generated_again_from_its_own_parameters(darkroom, tmp_path, registry):
    revision = registry.models["darkroom-demo"].revision
    params = GenerationParams(
        prompt="a red apple",
        negative_prompt="a pear",
        model="darkroom-demo",
        width=64,
        height=64,
        num_inference_steps=3,
        guidance_scale=2.0,
        seed=99,
        output_format=OutputFormat.WEBP,
    )
    file = tmp_path / "image.webp"
    pixels = np.zeros((64, 64, 3), np.uint8)
    file.write_bytes(image_codec.encode(pixels, params, job_id="job_1", revision=revision))
    job = json.loads(darkroom("submit", "--from-image", file, "--steps", 4).stdout)

    wanted = params.model_copy(update={"num_inference_steps": 4}).model_dump(mode="json")
    assert job["input"] == wanted | {"priority": "normal"}


def test_a_job_is_canceled_retried_and_deleted(darkroom):
    job_id = json.loads(darkroom("submit", "a red apple").stdout)["id"]

    assert json.loads(darkroom("job", "cancel", job_id).stdout)["status"] == "canceled"
    assert json.loads(darkroom("job", "retry", job_id).stdout)["retried_from"] == job_id
    assert darkroom("job", "delete", job_id).exit_code == 0
    gone = darkroom("job", "show", job_id)
    assert (gone.exit_code, "was deleted" in gone.stderr) == (2, True)


def test_a_tenant_gets_a_share_and_a_key_that_expires(darkroom, api_database):
    def operator(*words):
        return darkroom(*words, database=api_database).stdout

    tenant_id = operator("tenants", "create", "studio", "--weight", 2).strip()
    key = operator("keys", "create", "--tenant", tenant_id, "--days", 30).strip()
    listed = operator("keys", "list")

    assert f"{tenant_id}  2  studio" in operator("tenants", "list")
    assert key.startswith("dk_")
    assert key not in listed
    assert f"{tenant_id}  {key[:11]}…  submit,read  expires 2" in listed
    unknown = darkroom("keys", "create", "--tenant", "ten_x", database=api_database)
    assert "no tenant 'ten_x'" in str(unknown.exception)


def test_a_tenants_weight_and_retention_change_together_or_alone(darkroom, api_database):
    def update(*words):
        return darkroom("tenants", "update", tenant_id, *words, database=api_database)

    def found():
        query = "SELECT weight, retention_days FROM tenant WHERE id = %s"
        with psycopg.connect(api_database) as connection:
            return connection.execute(query, [tenant_id]).fetchone()

    tenant_id = darkroom("tenants", "create", "lab", database=api_database).stdout.strip()
    assert update("--weight", 3, "--retention-days", 7).exit_code == 0
    assert found() == (3, 7)
    assert update("--retention-days", "none").exit_code == 0
    assert found() == (3, None)
    for words in ([], ["--retention-days", "0"], ["--retention-days", "soon"], ["--weight", "0"]):
        refused = update(*words)
        assert (refused.exit_code, "--" in refused.stderr) == (2, True)
    assert found() == (3, None)


def test_without_the_database_the_keys_command_says_so():
    url = f"postgresql://darkroom@127.0.0.1:{free_port()}/darkroom"
    command = process("keys", "list", DARKROOM_DATABASE_URL=url)
    done = subprocess.run(**command, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 2
    assert "DARKROOM_DATABASE_URL" in done.stderr


def test_a_person_at_a_terminal_reads_a_summary(api_url):
    terminal, inside = pty.openpty()
    command = process("submit", "a red apple", "--seed", "7", DARKROOM_API=api_url, NO_COLOR="1")
    done = subprocess.run(**command, stdout=inside, timeout=60, check=False)
    os.close(inside)
    printed = os.read(terminal, 10_000).decode()
    os.close(terminal)

    assert done.returncode == 0
    assert not re.search(r"\x1b\[[34]", printed)  # bold, but no color
    plain = re.sub(r"\x1b\[\d*m", "", printed)
    lines = dict(line.strip().split(maxsplit=1) for line in plain.splitlines())
    assert lines["job"].startswith("job_")
    assert lines["seed"] == "7"
    assert lines["prompt"] == "a red apple"
    assert lines["next"] == f"darkroom job watch {lines['job']}"


def test_an_image_gives_every_parameter_that_decides_it():
    assert list(GENERATION_FIELDS) == list(GenerationParams.model_fields)


def commands(group, words=()):
    yield words, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*words, name))


EVERY_COMMAND = dict(commands(get_command(app)))


@pytest.mark.parametrize("words", EVERY_COMMAND, ids=" ".join)
def test_every_command_and_option_explains_itself(darkroom, words):
    done = darkroom(*words, "--help")
    assert done.exit_code == 0
    assert "Usage" in done.stdout
    command = EVERY_COMMAND[words]
    assert command.help
    undocumented = [
        each.name for each in command.params if each.param_type_name == "option" and not each.help
    ]
    assert not undocumented
