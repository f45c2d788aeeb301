"""The `darkroom` command as a person types it, against an API without workers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from darkroom.generation import image_codec
from darkroom.generation.params import GenerationParams
from darkroom.local.ports import free_port
from darkroom.status import OutputFormat


@pytest.fixture
def darkroom(api_url):
    """Runs the command; what it printed, and how it left."""

    def run(*words, api=api_url, core=""):
        return subprocess.run(
            [sys.executable, "-m", "darkroom.cli", *map(str, words)],
            env=os.environ
            | {"DARKROOM_API": api, "DARKROOM_DATABASE_URL": core}
            | {"NO_COLOR": "1", "COLUMNS": "100"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def test_a_prompt_becomes_a_job(darkroom):
    done = darkroom("submit", "a red apple", "--seed", 7, "--steps", 5, "--guidance", 2.5)

    assert done.returncode == 0, done.stderr
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


def test_what_is_wrong_with_a_file_is_told_row_by_row(darkroom, tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,steps\na cat,0\n,3\n")
    done = darkroom("batch", "submit", file)

    assert done.returncode == 2
    assert "row.1.num_inference_steps" in done.stderr
    assert "row.2.prompt" in done.stderr


def test_a_server_that_is_not_there_is_told_from_a_mistake(darkroom):
    done = darkroom("submit", "a cat", api=f"http://127.0.0.1:{free_port()}")

    assert done.returncode == 3
    assert "darkroom up" in done.stderr


@pytest.mark.parametrize(
    "words", [["submit"], ["job", "show", "job_nonsense"], ["batch", "submit", "/nowhere.csv"]]
)
def test_a_mistake_exits_with_two(darkroom, words):
    assert darkroom(*words).returncode == 2


def test_a_picture_is_asked_for_again_by_itself(darkroom, tmp_path, registry):
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
    file = tmp_path / "picture.webp"
    pixels = np.zeros((64, 64, 3), np.uint8)
    file.write_bytes(image_codec.encode(pixels, params, job_id="job_1", revision=revision))
    job = json.loads(darkroom("submit", "--from-image", file, "--steps", 4).stdout)

    wanted = params.model_copy(update={"num_inference_steps": 4}).model_dump(mode="json")
    assert job["input"] == wanted | {"priority": "normal"}


def test_a_job_is_canceled_asked_for_again_and_deleted(darkroom):
    job_id = json.loads(darkroom("submit", "a red apple").stdout)["id"]

    assert json.loads(darkroom("job", "cancel", job_id).stdout)["status"] == "canceled"
    assert json.loads(darkroom("job", "retry", job_id).stdout)["retried_from"] == job_id
    assert darkroom("job", "delete", job_id).returncode == 0
    gone = darkroom("job", "show", job_id)
    assert (gone.returncode, "was deleted" in gone.stderr) == (2, True)


def test_a_tenant_gets_a_share_and_a_key_that_expires(darkroom, api_database):
    def core(*words):
        done = darkroom(*words, core=api_database)
        return done.stdout + done.stderr

    tenant_id = core("tenants", "create", "studio", "--weight", 2).strip()
    key = core("keys", "create", "--tenant", tenant_id, "--days", 30).strip()
    listed = core("keys", "list")

    assert f"{tenant_id}  2  studio" in core("tenants", "list")
    assert key.startswith("dk_")
    assert key not in listed
    assert f"{tenant_id}  {key[:11]}…  submit,read  expires 2" in listed
    assert "no tenant 'ten_x'" in core("keys", "create", "--tenant", "ten_x")


def test_without_the_database_the_keys_command_says_so(darkroom):
    url = f"postgresql://darkroom@127.0.0.1:{free_port()}/darkroom"
    done = darkroom("keys", "list", core=url)

    assert done.returncode == 2
    assert "DARKROOM_DATABASE_URL" in done.stderr


def test_every_command_explains_itself(darkroom):
    for words in (
        [],
        ["up"],
        ["submit"],
        ["job"],
        ["batch"],
        ["batch", "submit"],
        ["keys"],
        ["tenants"],
        ["webhooks"],
    ):
        done = darkroom(*words, "--help")
        assert done.returncode == 0
        assert "Usage" in done.stdout
