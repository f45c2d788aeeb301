"""What compiled plans are taken for: the ONNX they are built from draws what the model draws, and
those that do not fit are refused before a row is drawn.
"""

import asyncio
import json
import os
import shutil
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.requests import RowFailed
from engine.tensorrt.compiled_runner import CompiledRunner, read_pipeline_config
from engine.tensorrt.plans import Machine, PlanUnfit, find_plan
from engine.tensorrt.runner import checked_plans, filled_up, load_tensorrt_runner
from engine.torch_runner import TorchRunner
from tests.support.compiled_models import ASKED, ROOT
from tests.support.engine_requests import DEMO, events, failures, images, levels_apart, row
from workers.replica.model_host import ModelFailed, TritonTimeouts
from workers.replica.open_host import open_host

pytest.importorskip("onnxruntime", reason="needs the extra `compile`")
pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra `compile`")
pytestmark = pytest.mark.timeout(600)  # the first to ask for `compiled` waits for its exports


# Pictures


class Onnx:
    """A part's ONNX file as a network of the engine's."""

    def __init__(self, path: Path, most_rows: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(path), options)
        self._types = {entry.name: entry.type for entry in self._session.get_inputs()}
        self.most_rows = most_rows

    def __call__(self, inputs):
        half = {name for name, kind in self._types.items() if kind == "tensor(float16)"}
        arrays = {n: (t.half() if n in half else t).numpy() for n, t in inputs.items()}
        names = [entry.name for entry in self._session.get_outputs()]
        outputs = self._session.run(names, arrays)
        return {name: torch.from_numpy(array) for name, array in zip(names, outputs, strict=True)}


def onnx_runner(made, *, most_rows=3):
    facts = read_pipeline_config(made.model)
    networks = {
        part: Onnx(made.repository / part / "onnx/model.onnx", most_rows) for part in facts.parts
    }
    return CompiledRunner(facts, networks, sizes=None, device=torch.device("cpu"))


def row_of(made, prompt="a red apple", **changed):
    """In a size that the model was compiled for, or else in another."""
    width, height = made.asked.sizes[0]
    plain = {"width": width, "height": height, "num_inference_steps": 4}
    return row(prompt, **plain | changed)


@pytest.mark.parametrize("name", ASKED)
def test_the_onnx_of_a_model_draws_the_same_pictures_as_torch(compiled, name):
    made = compiled[name]
    asked = [
        row_of(made),
        row_of(made, "a lighthouse", seed=3, guidance_scale=1.0),
        row_of(made, "a fox"),
        row_of(made, scheduler="dpmsolver++", num_inference_steps=6),
        row_of(made, negative_prompt="red"),
    ]
    theirs = images(events(TorchRunner.load(made.model, threads=2), *asked, max_unet_rows=8))
    ours = images(events(onnx_runner(made), *asked, max_unet_rows=8))

    assert len(ours) == len(theirs) == len(asked)
    other = 2 if name == "demo" else 1  # random weights make little of a text
    assert levels_apart(theirs[0], theirs[other]) > 50  # it is not one picture for all
    assert max(levels_apart(ours[at], theirs[at]) for at in ours) <= 2


def test_a_size_that_was_not_compiled_is_a_mishap_of_its_row(compiled):
    made = compiled["demo"]
    runner = onnx_runner(made)
    runner.sizes = frozenset({(128, 128)})
    happened = events(
        runner, *(row_of(made, **odd) for odd in [{}, {"width": 64}, {"scheduler": "plms"}])
    )

    assert list(images(happened)) == [0]
    assert failures(happened) == {1: "invalid_params", 2: "invalid_params"}
    why = [event.message for event in happened if isinstance(event, RowFailed)]
    assert "compiled for 128x128" in why[0]
    assert "plms" in why[1]


@pytest.mark.parametrize(
    ("count", "least", "most", "filled"),
    [(1, 1, 64, 1), (1, 2, 64, 2), (3, 2, 64, 4), (16, 2, 64, 16), (17, 2, 64, 17), (5, 1, 6, 5)],
)
def test_small_calls_are_filled_up_to_rows_that_have_a_graph(count, least, most, filled):
    assert filled_up(count, least, most) == filled


# Plans that do not fit


@pytest.fixture
def plans(compiled):
    """The demo model's."""
    return compiled["demo"].repository


@pytest.fixture
def spoilt(plans, tmp_path):
    """The same, to be broken."""
    return shutil.copytree(plans, tmp_path / "plans")


def refused(repository, *, max_unet_rows=16, model_dir=DEMO):
    with pytest.raises(PlanUnfit, match="python -m compile") as refusal:
        checked_plans(
            model_dir, repository, read_pipeline_config(model_dir), max_unet_rows=max_unet_rows
        )
    return str(refusal.value)


def test_whole_plans_are_accepted(plans):
    facts = read_pipeline_config(DEMO)
    checked = checked_plans(DEMO, plans, facts, max_unet_rows=16)
    assert [plan.part for plan in checked] == ["text_encoder", "unet", "vae_decoder"]


def test_a_missing_part_is_refused(spoilt):
    shutil.rmtree(spoilt / "unet")
    assert "unet/1/engine.json is missing; make it: python -m compile" in refused(spoilt)


def test_a_plan_that_is_not_the_one_recorded_is_refused(spoilt):
    plan = spoilt / "vae_decoder/1/model.plan"
    plan.write_bytes(plan.read_bytes() + b"\0")
    assert "is not the file that engine.json was written for" in refused(spoilt)


def test_a_record_that_cannot_be_read_is_refused(spoilt):
    record = spoilt / "unet/1/engine.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"format": 2}))
    assert "cannot be read" in refused(spoilt)


def test_rows_beyond_the_profile_are_refused(plans):
    assert "it takes 16 rows of 128x128 at most" in refused(plans, max_unet_rows=32)
    unet = find_plan(plans, "unet", command="-")
    with pytest.raises(PlanUnfit, match="17 rows of 128x128 are in none of its profiles"):
        unet.profile(17, 128, 128)
    with pytest.raises(PlanUnfit, match="1 rows of 256x128"):
        unet.profile(1, 256, 128)
    assert unet.profile(1, 128, 128) == unet.profile(16, 128, 128) == 0


def test_each_size_has_its_profile(compiled):
    unet = find_plan(compiled["sd"].repository, "unet", command="-")
    assert [unet.profile(3, *size) for size in compiled["sd"].asked.sizes] == [0, 1]


@pytest.mark.parametrize("file", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_plans_of_other_weights_are_refused(plans, tmp_path, file):
    model = shutil.copytree(DEMO, tmp_path / "model")
    with (model / "unet" / file).open("ab") as changed:
        changed.write(b"\n")
    assert "unet: made from other weights" in refused(plans, model_dir=model)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"compute_capability": "9.0"}, "built for .*8.9.*, here is NVIDIA H100 .*9.0"),
        ({"builder_version": "1.8.0"}, "built by tensorrt-rtx 1.7.1.116, here is .*1.8.0"),
        ({"builder": "tensorrt"}, "built by tensorrt-rtx, and here is tensorrt"),
    ],
)
def test_a_plan_of_another_machine_is_refused(plans, changed, why):
    fitting = Machine("tensorrt-rtx", "1.7.1.116", "8.9", "NVIDIA H100")
    plan = find_plan(plans, "unet", command="-")
    plan.refuse_other_machine(fitting)
    with pytest.raises(PlanUnfit, match=f"{why}.*; make it again: python -m compile"):
        plan.refuse_other_machine(replace(fitting, **changed))


def test_plans_on_a_machine_without_a_gpu_are_refused(plans):
    with pytest.raises(PlanUnfit, match="plans need a GPU, and this model was to run on cpu"):
        load_tensorrt_runner(DEMO, plans, device="cpu", max_unet_rows=16)


def test_the_previous_engine_keeps_serving_when_the_next_does_not_fit(plans, tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "model_repository", repository)
    config = repository / "stable_diffusion/config.pbtxt"
    sound = config.read_text()
    env = {"DARKROOM_ENGINE_MODEL_DIR": str(DEMO), "DARKROOM_ENGINE_THREADS": "1"}
    inputs = {
        "prompt": np.array([b"a fox"] * 2, np.object_),
        "negative_prompt": np.array([b""] * 2, np.object_),
        "scheduler": np.array([b"ddim", b"plms"], np.object_),
        "seed": np.array([1, 1], np.int64),
        "num_inference_steps": np.array([1, 1], np.int32),
        "guidance_scale": np.array([1, 1], np.float32),
        "width": np.array([64, 64], np.int32),
        "height": np.array([64, 64], np.int32),
    }

    async def ends(host):
        async with aclosing(host.infer("stable_diffusion", inputs)) as responses:
            return {
                int(answer["index"][0]): answer.get("image", answer.get("error"))
                async for answer in responses
                if "step" not in answer
            }

    async def story():
        # which does not end by itself once it has refused to load a model anew
        host = open_host("subprocess", repository, env, patience=TritonTimeouts(exit_s=1))
        await host.start()
        try:
            await host.load("stable_diffusion")
            first = await ends(host)
            wanted = sound.replace('string_value: "torch"', 'string_value: "tensorrt"')
            config.write_text(wanted.replace('string_value: ""', f'string_value: "{plans}"'))
            os.utime(repository / "stable_diffusion/1/model.py")
            with pytest.raises(ModelFailed) as failed:
                await host.load("stable_diffusion")
            return first, str(failed.value), await ends(host)
        finally:
            await host.stop()

    first, why, after = asyncio.run(story())
    assert "max_unet_rows is 32, and it takes 16 rows of 128x128 at most" in why
    assert "make it again: python -m compile" in why
    assert first[0].shape == (64, 64, 3)
    assert first[1][0] == b"invalid_params"
    assert b"plms" in first[1][1]
    assert np.array_equal(first[0], after[0])
