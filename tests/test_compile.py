"""From weights to plans: two models through the whole command, on this machine's CPU.

The builder is TensorRT for RTX's: it needs no GPU. What it built cannot be executed here.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from tiny_models import DEMO, tiny_sd, tiny_xl

from darkroom import plan_store
from engine.compiled_runner import CompiledRunner, read_facts
from engine.draw import draw
from engine.plans import Machine, PlanUnfit, Profile, find_plan
from engine.rows import Mishap, Picture, Row
from engine.tensorrt_runner import checked_plans, filled_up, load_tensorrt_runner
from engine.torch_runner import TorchRunner
from workers.triton import ModelFailed, Patience, open_host

pytest.importorskip("onnxruntime", reason="needs the extra `compile`")
pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra `compile`")
pytestmark = pytest.mark.timeout(900)  # two exports on a busy machine

ROOT = Path(__file__).parents[1]
FLAGS = ["--builder", "tensorrt-rtx", "--threads", "1"]
#: model, then what is asked, then rows and sizes
ASKED = {
    "sd": (
        ["--precision", "fp32", "--compute-capability", "8.9"],
        (2, 4, 16),
        [(64, 64), (96, 64)],
    ),
    "demo": (["--precision", "fp32", "--compute-capability", "8.9"], (1, 8, 16), [(128, 128)]),
}
PARTS = {
    "sd": ["text_encoder", "unet", "vae_decoder"],
    "demo": ["text_encoder", "unet", "vae_decoder"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"sd": tiny_sd(folder / "sd"), "demo": DEMO}


def words(name, model, output):
    asked, rows, sizes = ASKED[name]
    return [
        *(str(model), *asked, *FLAGS, "--rows", ",".join(map(str, rows)), "--size"),
        *(f"{width}x{height}" for width, height in sizes),
        *("--output", str(output)),
    ]


@pytest.fixture(scope="module")
def made(models, tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Each model's repository, and what the command said; all at once, as there are two cores."""
    folder = tmp_path_factory.mktemp("plans")
    runs = {
        name: subprocess.Popen(
            [sys.executable, "-m", "compile", *words(name, model, folder / name)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, model in models.items()
    }
    said = {name: run.communicate(timeout=800)[0] for name, run in runs.items()}
    assert {name: run.returncode for name, run in runs.items()} == dict.fromkeys(runs, 0), said
    return {name: (folder / name, said[name]) for name in runs}


def compile_main(*arguments):
    from compile.__main__ import main

    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.chaos  # exports: minutes on a busy machine
def test_every_part_has_a_plan_with_the_profiles_asked_for(made, name):
    _, rows, sizes = ASKED[name]
    for part in PARTS[name]:
        plan = find_plan(made[name][0], part, make="-")
        wanted = {
            "unet": [Profile(rows=rows, width=width, height=height) for width, height in sizes],
            "vae_decoder": [Profile(rows=(1, 4, 8), width=w, height=h) for w, h in sizes],
        }.get(part, [Profile(rows=(1, *rows[1:]))])
        assert list(plan.record.profiles) == wanted
        assert plan.record.builder_version == "1.7.1.116"
        assert plan.path.stat().st_size > 100_000
        assert plan.record.export.opset == 23


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.chaos  # exports: minutes on a busy machine
def test_every_part_computes_what_torch_computes_at_several_batch_sizes(made, name):
    repository, said = made[name]
    for part in PARTS[name]:
        export = find_plan(repository, part, make="-").record.export
        assert 0 < export.deviation < {"float32": 5e-5, "float16": 2e-2}[export.precision]
        for rows in (1, 2, 5):
            assert any(
                f"{part}.{export.outputs[0].name}, {rows} rows" in line
                for line in said.splitlines()
            )


def test_tensorrt_is_told_the_shapes_of_the_profiles(tmp_path):
    from compile.build import _optimization_profile, open_target, profiles_of
    from compile.parts import parts_of

    target = open_target("tensorrt-rtx", "8.9")
    builder = target.trt.Builder(target.trt.Logger())
    unet = parts_of(tiny_xl(tmp_path), "float16")[-2]
    [profile] = profiles_of(unet, (1, 2, 8), [(96, 64)])
    told = _optimization_profile(builder, unet, profile)
    assert bool(told)
    shapes = {port.name: [tuple(s) for s in told.get_shape(port.name)] for port in unet.inputs}
    assert shapes == {
        "sample": [(1, 4, 16, 24), (2, 4, 16, 24), (8, 4, 16, 24)],
        "timestep": [(1,), (2,), (8,)],
        "encoder_hidden_states": [(1, 77, 96), (2, 77, 96), (8, 77, 96)],
        "text_embeds": [(1, 64), (2, 64), (8, 64)],
        "time_ids": [(1, 6), (2, 6), (8, 6)],
    }


@pytest.mark.chaos  # exports: minutes on a busy machine
def test_an_onnx_file_of_other_weights_fails_the_comparison(made, models):
    from compile.export import onnx_path
    from compile.parity import ParityFailed, compare
    from compile.parts import parts_of

    encoder = parts_of(models["sd"], "float32")[0]
    network = encoder.load()
    next(network.parameters()).mul_(1.1)
    with pytest.raises(ParityFailed, match=r"text_encoder\.hidden, 1 rows"):
        compare(encoder, network, onnx_path(made["sd"][0], "text_encoder"), [], tell=print)


@pytest.mark.chaos  # exports: minutes on a busy machine
def test_what_is_there_is_not_made_again_and_what_is_broken_is(made, models, capsys):
    repository, _ = made["sd"]
    before = {path: path.stat().st_mtime_ns for path in repository.rglob("*.onnx")}
    plan = repository / "text_encoder/1/model.plan"
    plan.write_bytes(plan.read_bytes()[:-1])

    assert compile_main(*words("sd", models["sd"], repository)) == 0

    said = capsys.readouterr().out
    assert "text_encoder: building" in said
    assert "unet: the plan is there" in said
    assert "vae_decoder: the plan is there" in said
    assert "exporting" not in said
    assert {path: path.stat().st_mtime_ns for path in repository.rglob("*.onnx")} == before


# Triton


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.chaos  # exports: minutes on a busy machine
def test_the_configurations_are_triton_s(made, name):
    from tritonclient.grpc import model_config_pb2

    for part in PARTS[name]:
        text = (made[name][0] / part / "config.pbtxt").read_text()
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
        assert (config.name, config.backend) == (part, "tensorrt")
        profiles = find_plan(made[name][0], part, make="-").record.profiles
        assert config.max_batch_size == max(profile.rows[2] for profile in profiles)
        assert len(config.instance_group[0].profile) == len(profiles)
    assert config.input[0].dims[0] == 4


@pytest.mark.chaos  # exports: minutes on a busy machine
def test_a_real_triton_reads_them_up_to_the_backend_that_only_nvidia_s_image_has(made, tmp_path):
    broken = tmp_path / "unet"
    shutil.copytree(made["demo"][0] / "unet", broken)
    config = broken / "config.pbtxt"
    config.write_text(config.read_text().replace("dims: [ 1 ] reshape { shape: [ ] }", "dims: [ ]"))

    async def refusals(repository, parts):
        host = open_host("subprocess", repository, {}, patience=Patience(exit_s=5))
        await host.start()
        try:
            return {part: await refusal(host, part) for part in parts}
        finally:
            await host.stop()

    async def refusal(host, part):
        with pytest.raises(ModelFailed) as failed:
            await host.load(part)
        return str(failed.value)

    sound = asyncio.run(refusals(made["demo"][0], PARTS["demo"]))
    assert all(
        "unable to find backend library for backend 'tensorrt'" in why for why in sound.values()
    )
    assert "failed to poll" in asyncio.run(refusals(tmp_path, ["unet"]))["unet"]


# The engine


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


def onnx_runner(model_dir, repository, *, most_rows=3):
    facts = read_facts(model_dir)
    networks = {
        part: Onnx(repository / part / "onnx/model.onnx", most_rows) for part in facts.parts
    }
    return CompiledRunner(facts, networks, sizes=None, device=torch.device("cpu"))


def rows(*changes, side=128):
    plain = Row("a red apple", "", 11, 4, 5.0, side, side)
    return [replace(plain, **changed) for changed in changes]


def pictures(runner, asked):
    return {
        e.index: e.pixels for e in draw(runner, asked, max_unet_rows=8) if isinstance(e, Picture)
    }


def levels_apart(one, other):
    return int(np.abs(one.astype(np.int16) - other.astype(np.int16)).max())


@pytest.mark.chaos  # exports: minutes on a busy machine
def test_the_demo_model_s_onnx_draws_the_same_pictures_as_torch(made):
    asked = rows(
        {},
        {"prompt": "a lighthouse", "seed": 3, "guidance_scale": 1.0},
        {"prompt": "a fox"},
        {"scheduler": "dpmsolver++", "num_inference_steps": 6},
        {"negative_prompt": "red"},
    )
    theirs = pictures(TorchRunner.load(DEMO, threads=2), asked)
    ours = pictures(onnx_runner(DEMO, made["demo"][0]), asked)

    assert len(ours) == len(theirs) == len(asked)
    assert levels_apart(theirs[0], theirs[2]) > 50  # it is not one picture for all
    assert max(levels_apart(ours[at], theirs[at]) for at in ours) <= 2


@pytest.mark.chaos  # exports: minutes on a busy machine
def test_a_size_that_was_not_compiled_is_a_mishap_of_its_row(made):
    runner = onnx_runner(DEMO, made["demo"][0])
    runner.sizes = frozenset({(128, 128)})
    asked = rows({}, {"width": 64}, {"scheduler": "plms"})
    ends = {
        e.index: e for e in draw(runner, asked, max_unet_rows=8) if isinstance(e, Picture | Mishap)
    }

    assert isinstance(ends[0], Picture)
    assert (ends[1].code, ends[2].code) == ("invalid_params", "invalid_params")
    assert "compiled for 128x128" in ends[1].message
    assert "plms" in ends[2].message


@pytest.mark.parametrize(
    ("count", "least", "most", "filled"),
    [(1, 1, 64, 1), (1, 2, 64, 2), (3, 2, 64, 4), (16, 2, 64, 16), (17, 2, 64, 17), (5, 1, 6, 5)],
)
def test_small_calls_are_filled_up_to_rows_that_have_a_graph(count, least, most, filled):
    assert filled_up(count, least, most) == filled


# Plans that do not fit


@pytest.fixture
def spoilt(made, tmp_path):
    """The demo model's repository, to be broken."""
    return shutil.copytree(made["demo"][0], tmp_path / "plans")


def refused(repository, *, max_unet_rows=16, model_dir=DEMO):
    with pytest.raises(PlanUnfit, match="python -m compile") as refusal:
        checked_plans(model_dir, repository, read_facts(model_dir), max_unet_rows=max_unet_rows)
    return str(refusal.value)


@pytest.mark.chaos  # exports: minutes on a busy machine
def test_whole_plans_are_accepted(made):
    facts = read_facts(DEMO)
    plans = checked_plans(DEMO, made["demo"][0], facts, max_unet_rows=16)
    assert [plan.part for plan in plans] == PARTS["demo"]


@pytest.mark.chaos  # exports: minutes on a busy machine
def test_a_missing_part_is_refused(spoilt):
    shutil.rmtree(spoilt / "unet")
    assert "unet: " in (why := refused(spoilt))
    assert "is missing" in why


@pytest.mark.chaos  # exports: minutes on a busy machine
def test_a_plan_that_is_not_the_one_recorded_is_refused(spoilt):
    plan = spoilt / "vae_decoder/1/model.plan"
    plan.write_bytes(plan.read_bytes() + b"\0")
    assert "is not the file that engine.json was written for" in refused(spoilt)


@pytest.mark.chaos  # exports: minutes on a busy machine
def test_a_record_that_cannot_be_read_is_refused(spoilt):
    record = spoilt / "unet/1/engine.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"format": 2}))
    assert "cannot be read" in refused(spoilt)


@pytest.mark.chaos  # exports: minutes on a busy machine
def test_rows_beyond_the_profile_are_refused(made):
    assert "it takes 16 rows of 128x128 at most" in refused(made["demo"][0], max_unet_rows=32)
    unet = find_plan(made["demo"][0], "unet", make="-")
    with pytest.raises(PlanUnfit, match="17 rows of 128x128 are in none of its profiles"):
        unet.profile(17, 128, 128)
    with pytest.raises(PlanUnfit, match="1 rows of 256x128"):
        unet.profile(1, 256, 128)
    assert unet.profile(1, 128, 128) == 0


@pytest.mark.chaos  # exports: minutes on a busy machine
def test_plans_of_other_weights_are_refused(made, tmp_path):
    model = shutil.copytree(DEMO, tmp_path / "model")
    (model / "unet/config.json").write_text((model / "unet/config.json").read_text() + "\n")
    assert "unet: made from other weights" in refused(made["demo"][0], model_dir=model)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"compute_capability": "9.0"}, "built for .*8.9.*, here is NVIDIA H100 .*9.0"),
        ({"builder_version": "1.8.0"}, "built by tensorrt-rtx 1.7.1.116, here is .*1.8.0"),
        ({"builder": "tensorrt"}, "built by tensorrt-rtx, and here is tensorrt"),
    ],
)
@pytest.mark.chaos  # exports: minutes on a busy machine
def test_a_plan_of_another_machine_is_refused(made, changed, why):
    fitting = Machine("tensorrt-rtx", "1.7.1.116", "8.9", "NVIDIA H100")
    plan = find_plan(made["demo"][0], "unet", make="-")
    plan.refuse_other_machine(fitting)
    with pytest.raises(PlanUnfit, match=f"{why}.*; make it again: python -m compile"):
        plan.refuse_other_machine(replace(fitting, **changed))


@pytest.mark.chaos  # exports: minutes on a busy machine
def test_plans_on_a_machine_without_a_gpu_are_refused(made):
    with pytest.raises(PlanUnfit, match="plans need a GPU, and this model was to run on cpu"):
        load_tensorrt_runner(DEMO, made["demo"][0], device="cpu", max_unet_rows=16)


@pytest.mark.chaos  # exports: minutes on a busy machine
def test_the_previous_engine_keeps_serving_when_the_next_does_not_fit(made, tmp_path):
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
        host = open_host("subprocess", repository, env, patience=Patience(exit_s=10))
        await host.start()
        try:
            await host.load("stable_diffusion")
            first = await ends(host)
            whys = []
            for plans in (tmp_path / "nowhere", made["demo"][0]):
                wanted = sound.replace('string_value: "torch"', 'string_value: "tensorrt"')
                wanted = wanted.replace('string_value: ""', f'string_value: "{plans}"')
                config.write_text(wanted)
                os.utime(repository / "stable_diffusion/1/model.py")
                with pytest.raises(ModelFailed) as failed:
                    await host.load("stable_diffusion")
                whys.append(str(failed.value))
            return first, whys, await ends(host)
        finally:
            await host.stop()

    first, whys, after = asyncio.run(story())
    assert "text_encoder/1/engine.json is missing; make it: python -m compile" in whys[0]
    assert "max_unet_rows is 32, and it takes 16 rows of 128x128 at most" in whys[1]
    assert first[0].shape == (64, 64, 3)
    assert first[1][0] == b"invalid_params"
    assert b"plms" in first[1][1]
    assert np.array_equal(first[0], after[0])


# The command


@pytest.mark.parametrize(
    ("changed", "code", "why"),
    [
        (["nowhere"], 2, "neither a folder nor a hub id"),
        ([ROOT / "tests"], 2, "no model_index.json"),
        ([DEMO, "--size", "65x64", "--dry-run"], 2, "multiples of 32"),
        ([DEMO], 2, "tensorrt cannot be imported"),
        ([DEMO, *FLAGS], 1, "say --compute-capability"),
        ([DEMO, *FLAGS, "--compute-capability", "4.2"], 1, "does not build for compute capability"),
    ],
)
def test_what_cannot_be_made_is_said_before_the_work(tmp_path, capsys, changed, code, why):
    if changed == [DEMO] and shutil.which("nvidia-smi"):
        pytest.skip("TensorRT may be here")
    assert compile_main(*changed, "--output", tmp_path) == code
    told = capsys.readouterr()
    assert why in told.err
    assert "exporting" not in told.out


def test_a_model_of_another_kind_is_refused(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert compile_main(tmp_path, "--dry-run", "--size", "64x64", "--output", tmp_path / "out") == 2
    assert "is a FluxPipeline, not a Stable Diffusion 1, 2 or XL" in capsys.readouterr().err


@pytest.mark.parametrize("rows", ["2", "4,2,1", "0,1,2", "1,2,3,4"])
def test_rows_that_are_no_profile_are_a_usage_error(capsys, rows):
    with pytest.raises(SystemExit) as left:
        compile_main(DEMO, "--rows", rows)
    assert left.value.code == 2
    assert "--rows" in capsys.readouterr().err


@pytest.mark.chaos  # exports: minutes on a busy machine
def test_a_repository_goes_to_s3_and_comes_back(made, s3_settings, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_settings.endpoint_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_settings.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_settings.secret_access_key)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    source, url = made["sd"][0], f"s3://{s3_settings.bucket}/plans/sd"
    files = [path for path in source.rglob("*") if path.is_file()]

    assert plan_store.push(source, url) == len(files)
    assert plan_store.push(source, url) == 0
    assert plan_store.pull(url, tmp_path) == len(files)
    assert plan_store.pull(url, tmp_path) == 0
    (tmp_path / "unet/1/model.plan").write_bytes(b"half of it")
    assert plan_store.pull(url, tmp_path) == 1
    for part in PARTS["sd"]:
        find_plan(tmp_path, part, make="-")
