"""Replicas come and go with the queued work: Ray Serve itself, with replicas that do nothing."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from darkroom.local.child import running
from darkroom.local.ray_head import choose_ray_ports, client_environment, ray_head

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(HERE.parent)}


def test_replicas_follow_the_work_from_none_to_the_most_and_back(tmp_path):
    steps = ["0:0", "3:1", "50:2", "4:1", "0:0"]
    short = Path(tempfile.mkdtemp(prefix="dk"))  # Ray's sockets have short names
    token = tmp_path / "token"
    spec = ray_head(
        short, ports=choose_ray_ports(), token=token, cpus=2,
        env=ENVIRONMENT, log=tmp_path / "ray.log",
    )  # fmt: skip
    try:
        with running(spec) as head:
            driver = subprocess.run(
                [sys.executable, HERE / "replica_counts.py", head.url, *steps],
                env=ENVIRONMENT | client_environment(token),
                capture_output=True, text=True, timeout=400, check=False,
            )  # fmt: skip
    finally:
        shutil.rmtree(short, ignore_errors=True)
    assert driver.returncode == 0, driver.stderr[-3000:]
    assert driver.stdout.split() == steps
