"""Compiled plans: their ONNX generates the model's images, and unfit plans are rejected."""

import asyncio
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.requests import RowFailed
from engine.tensorrt.compiled_runner import CompiledRunner, read_pipeline_config
from engine.tensorrt.plans import Machine, PlanUnfit, find_plan
from engine.tensorrt.runner import checked_plans, load_tensorrt_runner, padded_rows
from engine.torch_runner import TorchRunner
from tests.support.compiled_models import ARGUMENTS, ROOT
from tests.support.engine_requests import DEMO, events, failures, images, levels_apart, row
from tests.support.triton_hosts import responses, texts
from tests.support.triton_hosts import row as row_inputs
from workers.replica.model_host import ModelFailed, TritonTimeouts
from workers.replica.open_host import open_host

pytest.importorskip("onnxruntime", reason="needs the extra `compile`")
pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra `compile`")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),  # the first test that uses `compiled` waits for its exports
]


# Images


class OnnxNetwork:
    """A part's ONNX file as a CompiledNetwork."""

    def __init__(self, path: Path, max_rows: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(path), options)
        self._types = {entry.name: entry.type for entry in self._session.get_inputs()}
        self.max_rows = max_rows

    def __call__(self, inputs):
        half = {name for name, kind in self._types.items() if kind == "tensor(float16)"}
        arrays = {n: (t.half() if n in half else t).numpy() for n, t in inputs.items()}
        names = [entry.name for entry in self._session.get_outputs()]
        outputs = self._session.run(names, arrays)
        return {name: torch.from_numpy(array) for name, array in zip(names, outputs, strict=True)}


def onnx_runner(made, *, max_rows=3):
    config = read_pipeline_config(made.model)
    networks = {
        part: OnnxNetwork(made.repository / part / "onnx/model.onnx", max_rows)
        for part in config.parts
    }
    return CompiledRunner(config, networks, sizes=None, device=torch.device("cpu"))


def row_of(made, prompt="a red apple", **changed):
    """Return a row, by default of a size that the model was compiled for."""
    width, height = made.arguments.sizes[0]
    plain = {"width": width, "height": height, "num_inference_steps": 4}
    return row(prompt, **plain | changed)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_onnx_of_a_model_generates_the_same_images_as_torch(compiled, name):
    made = compiled[name]
    rows = [
        row_of(made),
        row_of(made, "a lighthouse", seed=3, guidance_scale=1.0),
        row_of(made, "a fox"),
        row_of(made, scheduler="dpmsolver++", num_inference_steps=6),
        row_of(made, negative_prompt="red"),
    ]
    theirs = images(events(TorchRunner.load(made.model, threads=2), *rows, max_unet_rows=8))
    ours = images(events(onnx_runner(made), *rows, max_unet_rows=8))

    assert len(ours) == len(theirs) == len(rows)
    other = 2 if name == "demo" else 1  # with random weights a text has little effect
    assert levels_apart(theirs[0], theirs[other]) > 50  # the images differ at all
    assert max(levels_apart(ours[at], theirs[at]) for at in ours) <= 2


def test_a_size_that_was_not_compiled_fails_its_row(compiled):
    made = compiled["demo"]
    runner = onnx_runner(made)
    runner.sizes = frozenset({(128, 128)})
    happened = events(
        runner, *(row_of(made, **odd) for odd in [{}, {"width": 64}, {"scheduler": "plms"}])
    )

    assert list(images(happened)) == [0]
    assert failures(happened) == {1: "invalid_params", 2: "invalid_params"}
    messages = [event.message for event in happened if isinstance(event, RowFailed)]
    assert "compiled for 128x128" in messages[0]
    assert "plms" in messages[1]


@pytest.mark.parametrize(
    ("count", "minimum", "maximum", "padded"),
    [(1, 1, 64, 1), (1, 2, 64, 2), (3, 2, 64, 4), (16, 2, 64, 16), (17, 2, 64, 17), (5, 1, 6, 5)],
)
def test_small_batches_are_padded_to_rows_that_have_a_graph(count, minimum, maximum, padded):
    assert padded_rows(count, minimum, maximum) == padded


# Plans that do not fit


@pytest.fixture
def plans(compiled):
    """Return the demo model's."""
    return compiled["demo"].repository


@pytest.fixture
def plans_copy(plans, tmp_path):
    """Return a copy to be damaged."""
    return shutil.copytree(plans, tmp_path / "plans")


def rejection(repository, *, max_unet_rows=16, model_dir=DEMO):
    with pytest.raises(PlanUnfit, match="python -m compile") as error:
        checked_plans(
            model_dir, repository, read_pipeline_config(model_dir), max_unet_rows=max_unet_rows
        )
    return str(error.value)


def test_intact_plans_are_accepted(plans):
    config = read_pipeline_config(DEMO)
    checked = checked_plans(DEMO, plans, config, max_unet_rows=16)
    assert [plan.part for plan in checked] == ["text_encoder", "unet", "vae_decoder"]


def test_a_missing_part_is_rejected(plans_copy):
    shutil.rmtree(plans_copy / "unet")
    assert "unet/1/engine.json is missing; build it: python -m compile" in rejection(plans_copy)


def test_a_plan_that_is_not_the_one_recorded_is_rejected(plans_copy):
    plan = plans_copy / "vae_decoder/1/model.plan"
    plan.write_bytes(plan.read_bytes() + b"\0")
    assert "is not the file that engine.json was written for" in rejection(plans_copy)


def test_a_record_that_cannot_be_read_is_rejected(plans_copy):
    record = plans_copy / "unet/1/engine.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"format": 2}))
    assert "cannot be read" in rejection(plans_copy)


def test_rows_beyond_the_profile_are_rejected(plans):
    assert "it takes at most 16 rows of 128x128" in rejection(plans, max_unet_rows=32)
    unet = find_plan(plans, "unet", command="-")
    with pytest.raises(PlanUnfit, match="17 rows of 128x128 are in none of its profiles"):
        unet.profile(17, 128, 128)
    with pytest.raises(PlanUnfit, match="1 rows of 256x128"):
        unet.profile(1, 256, 128)
    assert unet.profile(1, 128, 128) == unet.profile(16, 128, 128) == 0


def test_each_size_has_its_profile(compiled):
    unet = find_plan(compiled["sd"].repository, "unet", command="-")
    assert [unet.profile(3, *size) for size in compiled["sd"].arguments.sizes] == [0, 1]


@pytest.mark.parametrize("file", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_plans_of_other_weights_are_rejected(plans, tmp_path, file):
    model = shutil.copytree(DEMO, tmp_path / "model")
    with (model / "unet" / file).open("ab") as changed:
        changed.write(b"\n")
    assert "unet: made from other weights" in rejection(plans, model_dir=model)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"compute_capability": "9.0"}, "built for .*8.9.*, but the GPU here is NVIDIA H100 .*9.0"),
        ({"builder_version": "1.8.0"}, "built by tensorrt-rtx 1.7.1.116, but .*1.8.0 is installed"),
        ({"builder": "tensorrt"}, "built by tensorrt-rtx, but tensorrt is installed"),
    ],
)
def test_a_plan_of_another_machine_is_rejected(plans, changed, reason):
    fitting = Machine("tensorrt-rtx", "1.7.1.116", "8.9", "NVIDIA H100")
    plan = find_plan(plans, "unet", command="-")
    plan.require_machine(fitting)
    with pytest.raises(PlanUnfit, match=f"{reason}.*; build it again: python -m compile"):
        plan.require_machine(replace(fitting, **changed))


def test_plans_on_a_machine_without_a_gpu_are_rejected(plans):
    with pytest.raises(PlanUnfit, match="plans need a GPU, but this model is configured for cpu"):
        load_tensorrt_runner(DEMO, plans, device="cpu", max_unet_rows=16)


def test_the_previous_engine_keeps_serving_when_the_next_does_not_fit(plans, tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "model_repository", repository)
    config = repository / "stable_diffusion/config.pbtxt"
    sound = config.read_text()
    env = {"DARKROOM_ENGINE_MODEL_DIR": str(DEMO), "DARKROOM_ENGINE_THREADS": "1"}
    rows = [row_inputs(scheduler=texts("ddim")), row_inputs(scheduler=texts("plms"))]

    async def last_responses(host):
        return [(await responses(host, inputs))[-1] for inputs in rows]

    async def loaded_twice():
        # Triton does not exit by itself after it failed to load a model again
        host = open_host("subprocess", repository, env, timeouts=TritonTimeouts(exit_s=1))
        await host.start()
        try:
            await host.load("stable_diffusion")
            first = await last_responses(host)
            compiled = sound.replace('string_value: "torch"', 'string_value: "tensorrt"')
            config.write_text(compiled.replace('string_value: ""', f'string_value: "{plans}"'))
            os.utime(repository / "stable_diffusion/1/model.py")
            with pytest.raises(ModelFailed) as failed:
                await host.load("stable_diffusion")
            return first, str(failed.value), await last_responses(host)
        finally:
            await host.stop()

    first, error, after = asyncio.run(loaded_twice())
    assert "max_unet_rows is 32, but it takes at most 16 rows of 128x128" in error
    assert "build it again: python -m compile" in error
    assert first[0]["image"].shape == (64, 64, 3)
    assert first[1]["error"][0] == b"invalid_params"
    assert b"plms" in first[1]["error"][1]
    assert np.array_equal(first[0]["image"], after[0]["image"])
