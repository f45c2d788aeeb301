"""Dockerfile and .dockerignore: what can be checked without a Docker daemon."""

import re
import subprocess
import sys

import yaml

from darkroom.settings import HOME
from tests.support.compose_files import dockerfile_lines, sent_to_builder, tracked_files


def test_every_target_that_compose_builds_is_in_the_dockerfile(services):
    wanted = {service["build"]["target"] for service in services.values() if "build" in service}
    stages = {line.split()[-1] for line in dockerfile_lines() if line.startswith("FROM ")}

    assert wanted == stages - {"base"}


def test_an_image_without_its_own_build_is_built_for_another_service(services):
    built = {service["image"] for service in services.values() if "build" in service}

    for name, service in services.items():
        if service["image"].startswith("darkroom-"):
            assert service["image"] in built, name


def test_every_copied_file_exists_and_passes_dockerignore():
    tracked = tracked_files()
    copied = [line.split()[1:-1] for line in dockerfile_lines() if line.startswith("COPY ")]

    assert copied
    for source in {source for sources in copied for source in sources}:
        files = [file for file in tracked if file == source or file.startswith(f"{source}/")]
        assert files, f"{source} is not in the repository"
        assert any(map(sent_to_builder, files)), f"{source} is ignored"


def test_the_files_that_the_code_reads_reach_the_builder():
    for file in (
        "migrations/versions/0001_first_tables.py",
        "model_repository/stable_diffusion/config.pbtxt",
        "models/darkroom-demo/darkroom.toml",
        "darkroom/local/darkroom_processes.py",
    ):
        assert sent_to_builder(file), file
    for file in ("tests/conftest.py", ".venv/bin/python", "model_repository/unet/1/model.plan"):
        assert not sent_to_builder(file), file


def test_the_image_runs_what_compose_tells_it_to(services):
    stages: dict[str, list[str]] = {}
    for line in dockerfile_lines():
        if line.startswith("FROM "):
            stage = stages.setdefault(line.split()[-1], [])
        elif stages:
            stage.append(line)

    for name, service in services.items():
        if "build" in service:
            (command,) = [
                yaml.safe_load(line.removeprefix("CMD "))
                for line in stages[service["build"]["target"]]
                if line.startswith("CMD ")
            ]
            assert service["command"][: len(command)] == command, name


def test_no_image_has_a_tag_without_a_version(services):
    images = [s["image"] for s in services.values() if not s["image"].startswith("darkroom-")]
    images += re.findall(r"(?m)^ARG \w+_IMAGE=(\S+)", (HOME / "Dockerfile").read_text())

    for image in images:
        assert re.search(r":\d", image), image


def test_packages_can_be_installed_before_they_are_copied(tmp_path):
    script = HOME / "deploy" / "compose" / "package_folders.py"

    subprocess.run([sys.executable, script, HOME / "pyproject.toml"], cwd=tmp_path, check=True)

    assert (tmp_path / "darkroom" / "__init__.py").exists()
    assert (tmp_path / "workers" / "__init__.py").exists()
