"""Three models compiled by the whole command, once a run.

Like Stable Diffusion 1.5, like XL (in half precision), and the demo model. The builder is TensorRT
for RTX's, which needs no GPU; its plans cannot be executed here.
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
class CompileArguments:
    """Arguments of the command for one model."""

    precision: str
    rows: tuple[int, int, int]
    sizes: list[tuple[int, int]]
    parts: tuple[str, ...] = ("text_encoder", "unet", "vae_decoder")

    def command_line(self, model: Path, output: Path) -> list[str]:
        """Return them as strings."""
        return [
            *(str(model), "--precision", self.precision, "--compute-capability", "8.9", *FLAGS),
            *("--rows", ",".join(map(str, self.rows)), "--output", str(output)),
            *("--size", *(f"{width}x{height}" for width, height in self.sizes)),
        ]


ARGUMENTS = {
    "sd": CompileArguments("fp32", (2, 4, 16), [(64, 64), (96, 64)]),
    "xl": CompileArguments(
        "fp16", (1, 2, 8), [(64, 64)], ("text_encoder", "text_encoder_2", "unet", "vae_decoder")
    ),
    "demo": CompileArguments("fp32", (1, 8, 16), [(128, 128)]),
}
#: one process each, for two cores
PROCESSES = [["sd", "xl"], ["demo"]]


@dataclass(frozen=True)
class CompiledModel:
    """A model that was compiled by the command."""

    name: str
    model: Path
    repository: Path
    output: str

    @property
    def arguments(self) -> CompileArguments:
        """The arguments it was compiled with."""
        return ARGUMENTS[self.name]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CompiledModel]:
    """Compile all models. The test processes share them."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    models = {name: folder / name for name in ARGUMENTS} | {"demo": DEMO}
    plans = {name: folder / f"{name}-plans" for name in ARGUMENTS}
    kept = folder / "compiled.json"
    with FileLock(folder / "compiled.lock"):
        if not kept.exists():
            kept.write_text(json.dumps(_compile(models, plans)))
        outputs = json.loads(kept.read_text())
    return {
        name: CompiledModel(name, models[name], plans[name], outputs[name]) for name in ARGUMENTS
    }


def _compile(models: dict[str, Path], plans: dict[str, Path]) -> dict[str, str]:
    """Return the command's output for each."""
    from tests.support.tiny_models import tiny_sd, tiny_xl

    tiny_sd(models["sd"])
    tiny_xl(models["xl"])
    runs = [
        _started([ARGUMENTS[n].command_line(models[n], plans[n]) for n in names])
        for names in PROCESSES
    ]
    try:
        outputs = [run.communicate(timeout=600)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert all(run.returncode == 0 for run in runs), outputs
    return {
        name: text
        for names, texts in zip(PROCESSES, outputs, strict=True)
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
