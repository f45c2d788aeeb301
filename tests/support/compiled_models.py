"""Three models through the whole command, once a run: `pytest_plugins = ["compiled"]`.

Like Stable Diffusion 1.5, like XL (in half precision), and the demo model. The builder is TensorRT
for RTX's, which needs no GPU; what it built cannot be executed here.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "models/darkroom-demo"
FLAGS = ["--builder", "tensorrt-rtx", "--threads", "1"]


@dataclass(frozen=True)
class Asked:
    """What is asked of the command for one model."""

    precision: str
    rows: tuple[int, int, int]
    sizes: list[tuple[int, int]]
    parts: tuple[str, ...] = ("text_encoder", "unet", "vae_decoder")

    def words(self, model: Path, output: Path) -> list[str]:
        """Its arguments."""
        return [
            *(str(model), "--precision", self.precision, "--compute-capability", "8.9", *FLAGS),
            *("--rows", ",".join(map(str, self.rows)), "--output", str(output)),
            *("--size", *(f"{width}x{height}" for width, height in self.sizes)),
        ]


ASKED = {
    "sd": Asked("fp32", (2, 4, 16), [(64, 64), (96, 64)]),
    "xl": Asked(
        "fp16", (1, 2, 8), [(64, 64)], ("text_encoder", "text_encoder_2", "unet", "vae_decoder")
    ),
    "demo": Asked("fp32", (1, 8, 16), [(128, 128)]),
}
#: one process each, as there are two cores
TOGETHER = [["sd", "xl"], ["demo"]]


@dataclass(frozen=True)
class Compiled:
    """A model that went through the command."""

    name: str
    model: Path
    repository: Path
    said: str

    @property
    def asked(self) -> Asked:
        """What the command was told."""
        return ASKED[self.name]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    """All of them. Processes that share the tests share these, too."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    models = {name: folder / name for name in ASKED} | {"demo": DEMO}
    plans = {name: folder / f"{name}-plans" for name in ASKED}
    kept = folder / "compiled.json"
    with FileLock(folder / "compiled.lock"):
        if not kept.exists():
            kept.write_text(json.dumps(_compile(models, plans)))
        said = json.loads(kept.read_text())
    return {name: Compiled(name, models[name], plans[name], said[name]) for name in ASKED}


def _compile(models: dict[str, Path], plans: dict[str, Path]) -> dict[str, str]:
    """What the command said of each."""
    from tests.support.tiny_models import tiny_sd, tiny_xl

    tiny_sd(models["sd"])
    tiny_xl(models["xl"])
    runs = [_started([ASKED[n].words(models[n], plans[n]) for n in names]) for names in TOGETHER]
    try:
        said = [run.communicate(timeout=600)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert all(run.returncode == 0 for run in runs), said
    return {
        name: text
        for names, texts in zip(TOGETHER, said, strict=True)
        for name, text in zip(names, json.loads(texts), strict=True)
    }


def _started(runs: list[list[str]]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, Path(__file__).with_name("compile_models.py"), json.dumps(runs)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
